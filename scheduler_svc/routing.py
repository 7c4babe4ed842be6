"""Which of a model's workers a choice waits at."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler_svc.hits import found_tokens
from scheduler_svc.requests import Choice
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

    def route(self, workers: Sequence[Worker], choice: Choice) -> Worker | None:
        """The worker to wait at. None if no ready one can hold the choice."""
        able = [worker for worker in workers if worker.can_hold(choice)]
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
