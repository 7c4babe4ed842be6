"""Virtual time: events in order of their time, then of their making. One seed, one order."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Clock:
    """A heap of callbacks. `now` is in seconds from 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call at a time, not before now."""
        self._order += 1
        heapq.heappush(self._events, (max(when, self.now), self._order, call))

    def after(self, delay: float, call: Callable[[], None]) -> None:
        """Call after a delay."""
        self.at(self.now + delay, call)

    def step(self) -> bool:
        """Run the next event; False if there is none."""
        if not self._events:
            return False
        self.now, _, call = heapq.heappop(self._events)
        call()
        return True

    def next_time(self) -> float:
        """Time of the next event; inf if there is none."""
        return self._events[0][0] if self._events else float("inf")
