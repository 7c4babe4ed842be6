"""What others see of an engine: figures for /metrics, and whether its accounts agree."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.series import Series
from scheduler_svc.requests import State

if TYPE_CHECKING:
    from scheduler_svc.engine import Engine

log = logging.getLogger(__name__)

CELLS = 1024  # of a worker's picture, at most
REST = 1.0  # seconds of rest before the accounts are verified: a check may take longer than an arrival should wait


def stats(engine: Engine) -> dict[str, float]:
    """Gauges and counts for /metrics; blocks and slots are summed over workers."""
    ready = [worker for worker in engine.workers.values() if worker.ready]
    busy, idle = sum(w.busy_seconds for w in ready), sum(w.idle_seconds for w in ready)
    count = engine.counters.get
    return {
        "requests_waiting": engine.arrivals.waiting()[0],
        "requests_running": sum(w.running for w in ready),
        "requests_finished": engine.ledger.totals.finished,
        "requests_failed": engine.ledger.totals.failed,
        "requests_aborted": engine.ledger.totals.aborted,
        "blocks": sum(w.blocks.count for w in ready),
        "blocks_free": sum(w.blocks.free for w in ready),
        "blocks_cached": sum(w.blocks.cached for w in ready),
        "blocks_used": sum(w.blocks.used for w in ready),
        "host_blocks": sum(w.host.count for w in ready),
        "host_blocks_free": sum(w.host.pool.free for w in ready),
        "host_blocks_cached": sum(w.host.pool.cached for w in ready),
        "host_blocks_used": sum(w.host.pool.used for w in ready),
        "depth": max((w.depth.wanted for w in ready), default=0),
        "blocks_taken": sum(w.blocks.taken for w in ready),
        "plans_in_flight": sum(len(w.in_flight) for w in ready),
        "workers_ready": len(ready),
        "workers_loading": engine.loading(),
        "busy_share": busy / (busy + idle) if busy else 0.0,
        "preemptions": count("scheduler_preemptions", 0),
        "swaps_out": count("scheduler_swaps_out", 0),
        "swaps_in": count("scheduler_swaps_in", 0),
        "prefix_queries": count("scheduler_prefix_queries", 0),
        "prefix_hits": count("scheduler_prefix_hits", 0),
        "host_hits": count("scheduler_host_hits", 0),
    }


def series(engine: Engine) -> list[Series]:
    """The same by model, under vLLM's names."""
    found = []
    for model in engine.models.values():
        if model.ready is None:
            continue
        blocks = sum(worker.blocks.count for worker in model.workers)
        used = sum(worker.blocks.used for worker in model.workers)
        tally = model.tally
        figures = {
            "vllm:num_requests_running": sum(worker.running for worker in model.workers),
            "vllm:num_requests_waiting": engine.arrivals.waiting_for(model),
            "vllm:kv_cache_usage_perc": used / blocks if blocks else 0.0,
            "vllm:prefix_cache_queries": tally.queries,
            "vllm:prefix_cache_hits": tally.hits,
            "vllm:num_preemptions": tally.preemptions,
        }
        found += [Series(family, [model.name], float(value)) for family, value in figures.items()]
        found.append(tally.steps.series([model.name]))
    return found


def pictures(engine: Engine) -> dict[str, bytes]:
    """By ready worker: how many blocks a cell stands for (4 bytes, little-endian), then a byte per cell.

    0 free, 1 cached, 2 used, 3 used by several. A cell shows the first of its blocks, so that the cost has a bound.
    """
    drawn = {}
    for worker in engine.workers.values():
        if worker.ready:
            blocks = worker.blocks
            stride = -(-blocks.count // CELLS)
            cells = (
                min(n, 2) + 1 if n else name is not None for n, name in zip(blocks.refs[::stride], blocks.hash_of[::stride], strict=True)
            )
            drawn[worker.name] = stride.to_bytes(4, "little") + bytes(cells)
    return drawn


def check(engine: Engine) -> None:
    """Verify that accounts, tables, queues and states agree. Raises AssertionError."""
    in_flight: dict[int, int] = {}
    for worker in engine.workers.values():
        for flight in worker.in_flight:
            for index, n in flight.credit:
                in_flight[index] = in_flight.get(index, 0) + n
            assert sum(n for _, n in flight.credit) == len(flight.slots), "credit does not match the rows in flight"
        if worker.ready:
            worker.check()
    for frontend in engine.frontends.by_index:
        if frontend is not None:
            assert frontend.in_flight == in_flight.get(frontend.index, 0), "credit does not match the rows in flight"
            assert frontend.unsent == sum(request.unsent for request in frontend.requests.values())
    choices = [choice for request in engine.ledger.requests.values() for choice in request.work]
    for worker in engine.workers.values():
        if worker.ready:
            worker.host.check([choice.swap for choice in choices if choice.swap is not None and choice.worker is worker])
    assert all(choice.swap is None or choice.worker in engine.workers.values() for choice in choices)
    arriving = {id(choice) for choice in engine.arrivals}
    for request in engine.ledger.requests.values():
        assert request.frontend.requests.get(request.id) is request
        assert request.ended == all(choice.state is State.ENDED for choice in request.work), "a request has not ended with its choices"
        forking = {id(fork) for choice in request.choices for fork in choice.forks}
        assert request.ended or not request.unscored or request.scorer is not None, "nobody computes a prompt's log probabilities"
        for choice in request.work:
            place = {
                State.WAITING: choice.queue is not None or id(choice) in arriving,
                State.FORKING: id(choice) in forking,
                State.RUNNING: choice.slot >= 0,
                State.DRAINING: choice.slot >= 0,
                State.ENDED: choice.queue is None and choice.slot < 0 and not choice.forks,
            }
            assert place[choice.state], f"a choice is {choice.state.value}, and nowhere"


def rests(engine: Engine) -> bool:
    """Whether nothing is left to do."""
    return not engine.arrivals and not any(w.in_flight or (w.ready and (w.running or w.queue)) for w in engine.workers.values())


class IntegrityCheck:
    """Verifies an engine once after each busy time, and a worker once it is drained. `stirred` is to be set at each plan."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waits = False
        self.stirred = False
        for name in ("checks", "failures"):  # to be seen before there is one
            engine.counters.add(f"scheduler_integrity_{name}", 0)

    def unplanned(self, now: float) -> None:
        """Nothing could be planned: look whether that is because nothing is left to do."""
        if self._waits or not self.stirred or not rests(self._engine):
            return
        self._waits, self.stirred = True, False
        self._engine.timers.at(now + REST, self._at_rest)

    def _at_rest(self, _now: float) -> None:
        self._waits = False
        if not self.stirred and rests(self._engine):
            self.verify(self._engine.check)

    def verify(self, check: Callable[[], None]) -> None:
        """Count a check, and its failure if it raises AssertionError."""
        self._engine.counters.add("scheduler_integrity_checks")
        try:
            check()
        except AssertionError:
            self._engine.counters.add("scheduler_integrity_failures")
            log.exception("the scheduler's accounts do not agree")
