"""Which scheduler is in charge: epochs, resync and standby. No I/O, no clock.

An epoch is a counter above 32 random bits of the scheduler's start, so two schedulers never share one and the larger
number simply wins. A scheduler that starts listens for the resync time before it opens sessions: it learns the highest
epoch that anybody has seen and whether somebody else is in charge. In charge, it yields to any higher epoch; standing
by, it takes over once workers have been without an active scheduler for the standby time.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from math import inf

from protocol.messages import Hello
from protocol.times import Times


class State(Enum):
    RESYNC = "resync"
    ACTIVE = "active"
    STANDBY = "standby"


class Epochs:
    """The state of one scheduler. `seen` is the highest epoch known from the run directory.

    `claim(counter)` gives a counter above `counter` that no other scheduler of the run directory has been given.
    """

    def __init__(self, incarnation: int, seen: int, claim: Callable[[int], int], times: Times, now: float, standby: bool = False) -> None:
        self._incarnation = incarnation
        self._claim = claim
        self._times = times
        self._floor = seen  # a live session of this epoch or above means that somebody is in charge
        self.seen = seen
        self.epoch = 0  # ours, once active
        self.state = State.STANDBY if standby else State.RESYNC
        self._until = now + times.resync
        self._heard_active = now
        self._alone_since: dict[int, float] = {}  # worker incarnation → since when it has no session
        self.resyncing: set[int] = set()  # workers heard while resyncing, by incarnation

    def hello(self, hello: Hello, now: float) -> None:
        """Take what a HELLO tells, in any state. `state` may be another one afterwards."""
        higher = hello.epoch > self.seen
        self.seen = max(self.seen, hello.epoch)
        if self.state is State.ACTIVE:
            if higher and hello.epoch > self.epoch:
                self._stand_by(now)
        elif self.state is State.RESYNC:
            if hello.live and hello.epoch >= self._floor:
                self._stand_by(now)
            elif hello.role == "worker":
                self.resyncing.add(hello.incarnation)
        if self.state is State.STANDBY:
            if hello.live:
                self._heard_active = now
                self._alone_since.pop(hello.incarnation, None)
            elif hello.role == "worker":
                self._alone_since.setdefault(hello.incarnation, now)

    def stale(self, epoch: int, now: float) -> None:
        """A peer has seen a higher epoch than ours."""
        self.seen = max(self.seen, epoch)
        if self.state is not State.STANDBY and epoch > self.epoch:
            self._stand_by(now)

    def tick(self, now: float) -> None:
        """Let time pass: the end of resync, the standby's turn."""
        if self.state is State.RESYNC and now >= self._until:
            self.state = State.ACTIVE
            self.epoch = self._claim(self.seen >> 32) << 32 | self._incarnation & 0xFFFFFFFF
            self.seen = self.epoch
        elif self.state is State.STANDBY and now >= self._takeover_at():
            self.state = State.RESYNC
            self._until = now + self._times.resync
            self._floor = self.seen + 1  # only a newer one than those that fell silent counts as in charge

    def next_time(self) -> float:
        """When `tick` has something to do."""
        match self.state:
            case State.RESYNC:
                return self._until
            case State.STANDBY:
                return self._takeover_at()
            case State.ACTIVE:
                return inf

    def _takeover_at(self) -> float:
        if not self._alone_since:
            return inf
        return max(self._heard_active, min(self._alone_since.values())) + self._times.standby

    def _stand_by(self, now: float) -> None:
        self.state = State.STANDBY
        self.epoch = 0
        self.resyncing.clear()
        self._alone_since.clear()
        self._heard_active = now
