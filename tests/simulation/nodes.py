"""What the services have in common in the simulation: virtual sockets and threads around the real cores.

Every node can crash (it is discarded), pause (SIGSTOP: what arrives waits) and be started again under the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from protocol.counters import Counters
from protocol.listener import FRONTENDS
from protocol.messages import Hello
from protocol.sessions import Dialer, Event
from protocol.times import Times
from tests.simulation.broken import PROGRESS, Broken
from tests.simulation.clock import Clock
from tests.simulation.network import Connection, Frames, Network

SOON = 1e-4  # seconds: a wake-up that is overdue comes after this
SPINS = 200


class Node:
    """A process: a name, life, pauses, and a wake-up at the time its core names."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.clock = clock
        self.alive = True
        self.paused_until = 0.0
        self._wake_at = inf
        self._woken_at = -inf
        self._spins = 0  # wake-ups in a row, each as soon as it can be

    def run(self, call: Callable[[], None]) -> None:
        """Run something in this process: now, or when its pause ends; never, if it dies before."""
        if not self.alive:
            return
        if self.clock.now < self.paused_until:
            self.clock.at(self.paused_until, lambda: self.run(call))
        else:
            call()

    def pause(self, seconds: float) -> None:
        """SIGSTOP, then SIGCONT."""
        self.paused_until = max(self.paused_until, self.clock.now + seconds)

    def wake_at(self, when: float) -> None:
        """See to it that `wake` runs at a time (or earlier, if that was asked for before)."""
        if when < self._wake_at and when != inf:
            self._wake_at = when
            self.clock.at(when, lambda: self.run(self._woken))

    def _woken(self) -> None:
        if self.clock.now < self._wake_at:
            return  # an earlier wake-up has replaced this one
        self._wake_at = inf
        self._spins = self._spins + 1 if self.clock.now - self._woken_at < 2 * SOON else 0
        self._woken_at = self.clock.now
        if self._spins == SPINS:
            raise Broken(PROGRESS, f"{self.name} spins: it asks to be woken {SPINS} times in a row, with nothing to do")
        self.wake()

    def wake(self) -> None:
        raise NotImplementedError


class PeerNode(Node):
    """What frontends and workers share: a Dialer and its sockets towards every scheduler."""

    socket = FRONTENDS
    channels = 1
    role = "frontend"

    def __init__(self, name: str, clock: Clock, network: Network, schedulers: list[str], incarnation: int, times: Times) -> None:
        super().__init__(name, clock)
        self._network = network
        self._schedulers = schedulers
        self.counters = Counters()
        self.incarnation = incarnation
        self.dialer = Dialer(Hello(self.role, name, incarnation, 0), len(schedulers), self.channels, times, self.counters, clock.now)
        self._sockets: dict[tuple[int, int], Connection] = {}
        for endpoint in range(len(schedulers)):
            for channel in range(self.channels):
                self._connect(endpoint, channel)

    def _connect(self, endpoint: int, channel: int) -> None:
        def deliver(frames: Frames) -> None:
            def take() -> None:
                if connection.open:
                    self.take(self.dialer.receive(endpoint, channel, frames, self.clock.now))
                    self.turn()

            self.run(take)

        connection = self._network.connect(self.name, self._schedulers[endpoint], channel, self.socket, deliver)
        self._sockets[endpoint, channel] = connection

    def take(self, events: list[Event]) -> None:
        for event in events:
            self.event(event)

    def event(self, event: Event) -> None:
        raise NotImplementedError

    def wake(self) -> None:
        self.turn()

    def turn(self) -> None:
        """Timers, then transmit; sockets of an ended session are renewed."""
        self.take(self.dialer.tick(self.clock.now))
        self.transmit()
        self.wake_at(max(min(self.dialer.next_time(), self.deadline()), self.clock.now + SOON))

    def deadline(self) -> float:
        return inf

    def transmit(self) -> None:
        for endpoint, channel in sorted(self.dialer.reopen):
            self._network.close(self._sockets[endpoint, channel])
            self._connect(endpoint, channel)
        self.dialer.reopen.clear()
        for channel, queue in enumerate(self.dialer.out):
            while queue:
                endpoint, frames = queue.popleft()
                self._network.to_scheduler(self._sockets[endpoint, channel], frames)

    def lose_connections(self, scheduler: str) -> None:
        """The scheduler's process has ended: the sockets notice, and TCP reconnects."""
        if scheduler in self._schedulers:
            endpoint = self._schedulers.index(scheduler)

            def notice() -> None:
                self.take(self.dialer.disconnected(endpoint, self.clock.now))
                self.turn()

            self.run(notice)

    def crash(self) -> None:
        self.alive = False
        for connection in self._sockets.values():
            self._network.close(connection)
