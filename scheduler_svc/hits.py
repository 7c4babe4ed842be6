"""What a waiting choice need not compute: its longest prefix that a worker still has."""

from __future__ import annotations

from scheduler_svc.requests import Choice
from scheduler_svc.worker import Worker


def found(worker: Worker, choice: Choice) -> tuple[list[int], list[int]]:
    """The blocks of the choice's prefix on the device, and those that follow them in host memory.

    The host's are left out where computing them again is preferred to a copy, and where the choice, being swapped out,
    has blocks of its own there.
    """
    size = worker.block_size
    if size not in choice.chains or choice.no_hits:
        return [], []
    names, most = choice.chains[size].names, choice.most_cached // size
    device = worker.blocks.match(names, most)
    if choice.swap is not None or not worker.host.pool.by_hash:
        return device, []
    host = worker.host.pool.match(names[len(device) :], most - len(device))
    return device, host if worker.costs.prefers_copies(len(host), len(host) * size) else []


def found_tokens(worker: Worker, choice: Choice) -> int:
    """Tokens of the choice that the worker still has, wherever."""
    return worker.block_size * sum(map(len, found(worker, choice)))
