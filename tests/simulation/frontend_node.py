"""A frontend in the simulation, without its HTTP."""

from __future__ import annotations

from collections.abc import Callable

from frontend.entries import Entry, NewRequest
from frontend.journal import Journal
from protocol.messages import Submit
from protocol.sessions import Closed, Event, Opened, Received
from protocol.times import Times
from tests.simulation.clock import Clock
from tests.simulation.network import Network
from tests.simulation.nodes import PeerNode


class FrontendNode(PeerNode):
    """A frontend: the Journal, and clients that are the simulation's (`world.py`)."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        network: Network,
        schedulers: list[str],
        incarnation: int,
        times: Times,
        touched: Callable[[FrontendNode, Entry], None],
        revive: Callable[[Submit], NewRequest],
    ) -> None:
        super().__init__(name, clock, network, schedulers, incarnation, times)
        self.journal = Journal(incarnation, times, self.counters, revive)
        self.closed = False  # takes nothing new
        self._touched = touched
        self.turn()

    def event(self, event: Event) -> None:
        match event:
            case Opened(welcome):
                self.journal.opened(welcome, self.clock.now)
            case Closed():
                self.journal.closed(self.clock.now)
            case Received(message):
                self.journal.message(message, self.clock.now)
                if self.journal.fault is not None:
                    self.take(self.dialer.fail(0, self.clock.now, self.journal.fault))

    def attach(self, request: bytes, told: list[int]) -> Entry:
        entry = self.journal.attach(request, self.clock.now, told)
        self.turn()
        return entry

    def submit(self, new: NewRequest) -> Entry:
        entry = self.journal.submit(new, self.clock.now)
        self.turn()
        return entry

    def deadline(self) -> float:
        return self.journal.next_time()

    def turn(self) -> None:
        self.journal.tick(self.clock.now)
        super().turn()

    def transmit(self) -> None:
        while self.journal.out:
            self.dialer.send(self.journal.out.popleft(), self.clock.now)
        touched = list(self.journal.touched.values())
        self.journal.touched.clear()
        for entry in touched:
            self._touched(self, entry)
        while self.journal.out:
            self.dialer.send(self.journal.out.popleft(), self.clock.now)
        super().transmit()
