"""How long a request waits where there is no scheduler: while a session is open the scheduler keeps the deadlines."""

from __future__ import annotations

import math

from frontend.entries import Entry
from protocol.messages import Failed
from protocol.times import Times


class Deadlines:
    """Judges requests by the time since the last session (`closed_at`, in seconds) and since they were submitted."""

    def __init__(self, times: Times) -> None:
        self.closed_at = -math.inf
        self._times = times

    def due(self, entry: Entry) -> float:
        """When a request has waited too long."""
        return min(self._hold_until(entry), self._admit_until(entry))

    def overdue(self, entry: Entry, now: float) -> Failed | None:
        """How a request ends that has waited too long; None if it has not."""
        if now >= self._hold_until(entry):
            return Failed(entry.request, 503, "no_scheduler", "no scheduler has been reachable for too long", "", self._times.move)
        if now >= self._admit_until(entry):
            return Failed(
                entry.request, 503, "queue_timeout", "the request waited longer than its queue_timeout", "queue_timeout", self._times.move
            )
        return None

    def _hold_until(self, entry: Entry) -> float:
        return max(self.closed_at, entry.submitted) + self._times.hold

    def _admit_until(self, entry: Entry) -> float:
        return entry.submitted + entry.new.deadline if entry.new.deadline and not entry.admitted else math.inf
