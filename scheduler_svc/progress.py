"""Whether a worker's step still moves: a deadline judges its counter, not the time alone."""

from __future__ import annotations

from collections.abc import Callable

from protocol.times import Times
from scheduler_svc.ledger import Timers
from scheduler_svc.worker import Worker

LATE = 0.05  # seconds: our own delay that makes us an unfair judge


class Progress:
    """Watches workers with plans in flight; `fence(worker, reason)` ends a session."""

    def __init__(self, times: Times, timers: Timers, fence: Callable[[Worker, str], None]) -> None:
        self._times = times
        self._timers = timers
        self._fence = fence

    def planned(self, worker: Worker) -> None:
        """A plan has gone out."""
        if not worker.watched:
            self.watch(worker, self._deadline(worker))

    def watch(self, worker: Worker, due: float) -> None:
        """Judge the worker's progress at `due`."""
        worker.watched = True
        self._timers.at(due, lambda now: self._judge(worker, due, now))

    def _judge(self, worker: Worker, due: float, now: float) -> None:
        """End a session whose step has not moved. A judge that comes late has not read the latest news yet: it waits."""
        worker.watched = False
        if worker.fenced or worker.closed or not worker.in_flight:
            return
        if worker.phase != "serving":
            self.watch(worker, now + self._times.progress)
        elif now - due > LATE:
            self.watch(worker, now + min(now - due, self._times.progress))
        elif now < self._deadline(worker):
            self.watch(worker, self._deadline(worker))
        else:
            worker.hung = True
            self._fence(worker, f"step {worker.in_flight[0].step} has made no progress for {now - worker.heard:.1f} s")

    def _deadline(self, worker: Worker) -> float:
        return worker.heard + max(self._times.progress, 20 * worker.step_seconds)
