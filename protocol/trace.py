"""The timeline's raw material: spans of time that a service notes while somebody traces, and only then."""

from __future__ import annotations

from collections import deque

import msgspec

TOPIC = b"spans"  # before a message of spans; its subscription is what switches them on
MOST = 20_000  # spans kept between two publications; what is more is lost, counted
BATCH = 2_000  # spans of one message


class Span(msgspec.Struct, array_like=True, frozen=True):
    """Something that a service did from `begin` to `end`, in seconds of its own monotonic clock.

    `lane`: which of the service's parallel tracks. `key`: what it was done for: "session:step", or a request's id.
    """

    lane: str
    name: str
    begin: float
    end: float
    key: str = ""


class Spans(msgspec.Struct, array_like=True, tag="spans", frozen=True):
    """A service's spans since its last message."""

    role: str
    name: str
    incarnation: int
    pid: int
    spans: list[Span]
    lost: int = 0


class Trace:
    """A service's recorder. `note` may be called from any thread; ask `on` first, so that it costs nothing when off."""

    def __init__(self) -> None:
        self.on = False
        self.lost = 0
        self._spans: deque[Span] = deque()

    def note(self, lane: str, name: str, begin: float, end: float, key: str = "") -> None:
        """Keep a span until it is published."""
        if len(self._spans) < MOST:
            self._spans.append(Span(lane, name, begin, end, key))
        else:
            self.lost += 1

    def take(self) -> list[Span]:
        """At most a batch of what has been noted, oldest first; empty when there is no more."""
        taken: list[Span] = []
        while self._spans and len(taken) < BATCH:
            taken.append(self._spans.popleft())
        return taken
