"""Which of a model's workers a choice waits at."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler_svc.hits import found_tokens
from scheduler_svc.requests import Choice, Request
from scheduler_svc.worker import Worker

APART, TOGETHER = 0.25, 0.1  # difference in load (`Worker.load`) at which balancing begins, and ends


class Router:
    """The longest cached prefix, then the least load; while loads are far apart, the least load alone.

    Balancing begins at one difference in load and ends at a smaller one. With a single limit, choices would go to and
    fro between the worker that has their prefix and the one that has room, and each would fill up with all prefixes.
    """

    def __init__(self, policy: str) -> None:
        """`policy`: "prefix" as above; "load" and "round-robin", as they say, to compare with."""
        self._policy = policy
        self._balancing: set[str] = set()  # models
        self._turn = 0

    def route(self, workers: Sequence[Worker], choice: Choice, now: float) -> Worker | None:
        """The worker to wait at. None if no ready one can hold the choice, or it is quarantined and should not harm the only one yet."""
        able = [worker for worker in workers if worker.can_hold(choice)]
        if choice.request.quarantined and able:
            return _prover(able, choice.request) if len(able) > 1 or now >= choice.request.awaits_until else None
        able = [worker for worker in able if not worker.proving] or able
        if len(able) < 2:
            return able[0] if able else None
        if self._policy == "round-robin":
            self._turn += 1
            return able[self._turn % len(able)]
        loads = [worker.load for worker in able]
        if self._policy == "load" or self._balances(choice.request.model.name, loads):
            return able[loads.index(min(loads))]
        return min(zip(able, loads, strict=True), key=lambda pair: (-found_tokens(pair[0], choice), pair[1]))[0]

    def _balances(self, model: str, loads: Sequence[float]) -> bool:
        apart = max(loads) - min(loads)
        if apart > APART and max(loads) > 1.5 * min(loads):
            self._balancing.add(model)
        elif apart < TOGETHER:
            self._balancing.discard(model)
        return model in self._balancing


def _prover(able: Sequence[Worker], request: Request) -> Worker:
    """Where a quarantined request harms the fewest: beside others like it, else where the fewest choices are."""
    worker = min(able, key=lambda worker: (not worker.proving, worker.running + len(worker.queue)))
    worker.quarantined.append(request)
    return worker
