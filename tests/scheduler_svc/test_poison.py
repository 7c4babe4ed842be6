"""Requests that break their steps, and NaN."""

from __future__ import annotations

from msgspec.structs import replace

from protocol.columns import pack, unpack
from protocol.messages import NAN
from scheduler_svc.preemption import preempt
from scheduler_svc.requests import State
from tests.scheduler_svc.fake_worker import FakeWorker
from tests.scheduler_svc.play import PROMPT, Stage


def play_with_poison(stage: Stage, poison: int, returns_named: bool) -> tuple[list, int]:
    """24 requests, one of which fails every step it is in. Returns the streams and how often the worker was lost."""
    worker = stage.worker(slots=24, blocks=400, max_step_tokens=512)
    frontend = stage.frontend()
    streams = [frontend.submit([i + 1] * 9, stage.now, max_tokens=6, stop=False) for i in range(24)]
    lost = 0
    for _ in range(400):
        stage.now += 0.001
        stage.engine.tick(stage.now)
        stage.plan()
        if not worker.plans:
            break
        plan = worker.plans[0]
        records = {**worker.records, **{a.record: [a.prompt] for a in plan.admits}}
        bound = {slot: s.record for slot, s in worker.slots.items()}
        bound.update(zip(_ints(plan.bind_slots), _ints(plan.bind_records), strict=True))
        tokens = [records[bound[slot]][0] for slot in _ints(plan.slots)]
        if any((_ints(t) if isinstance(t, bytes) else t)[0] == poison for t in tokens):
            lost += 1
            session, step = worker.session, plan.step
            stage.lose(worker)
            if not returns_named:
                worker.incarnation += 1
            stage.reopen(worker, **({"failed_session": session, "failed_step": step} if returns_named else {}))
            worker.ready(stage.now)
            continue
        worker.step(stage.now)
        stage.deliver()
    frontend.verify()
    return streams, lost


def _ints(column: bytes) -> list[int]:
    return [int.from_bytes(column[i : i + 4], "little") for i in range(0, len(column), 4)]


def test_a_request_that_breaks_every_step_is_found_and_its_neighbours_live() -> None:
    for named in (True, False):
        streams, lost = play_with_poison(Stage(max_num_seqs=24), poison=11, returns_named=named)
        assert [i for i, stream in enumerate(streams) if stream.failed] == [10]
        assert all(stream.complete for i, stream in enumerate(streams) if i != 10)
        assert lost <= (7 if named else 9)


def test_a_session_reopened_by_the_same_process_makes_no_suspects() -> None:
    stage = Stage()
    worker = stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, max_tokens=30, stop=False)
    for _ in range(10):
        stage.plan()
        stage.lose(worker)
        stage.reopen(worker)
        assert not stage.engine.suspects.active
        worker.ready(stage.now)
    stage.run()
    assert stream.complete
    frontend.verify()


def came_back(stage: Stage, worker: FakeWorker) -> None:
    """Another process under the worker's name."""
    worker.incarnation += 10
    stage.reopen(worker)
    worker.ready(stage.now)
    stage.plan()


def failed_twice(stage: Stage) -> tuple[FakeWorker, FakeWorker]:
    """A request that has taken both workers along: the one where it failed first, and the other."""
    workers = [stage.worker(incarnation=1), stage.worker(incarnation=2)]
    stage.plan()
    for _ in workers:
        (at,) = [worker for worker in workers if worker.plans]
        at.plans.clear()
        stage.lose(at)
        stage.plan()
    return next(worker for worker in workers if worker is not at), at


def test_who_failed_as_a_suspect_is_tried_where_nobody_else_is() -> None:
    stage = Stage()
    frontend = stage.frontend()
    suspect = frontend.submit(PROMPT, stage.now, max_tokens=6, stop=False)
    first, second = failed_twice(stage)
    came_back(stage, first)
    assert not first.plans, "the other one may come back: who else waits is served meanwhile"
    came_back(stage, second)
    (prover,) = [worker for worker in (first, second) if worker.plans]
    other = second if prover is first else first
    innocent = [frontend.submit([i + 1] * 9, stage.now, max_tokens=6, stop=False) for i in range(4)]
    stage.plan()
    apart, serving = (stage.engine.workers[worker.session] for worker in (prover, other))
    assert (apart.running, serving.running) == (1, 4)
    assert not apart.queue
    stage.run()
    assert not apart.proving, "a known token clears it"
    assert all(stream.complete for stream in (suspect, *innocent))
    frontend.verify()


def test_who_failed_as_a_suspect_waits_the_move_time_at_most() -> None:
    stage = Stage()
    frontend = stage.frontend()
    suspect = frontend.submit(PROMPT, stage.now, max_tokens=6, stop=False)
    first, _ = failed_twice(stage)
    came_back(stage, first)
    stage.run()
    assert not suspect.complete
    stage.now += stage.settings.times.move
    stage.run()
    assert suspect.complete
    frontend.verify()


def test_nan_from_a_shared_block_is_recomputed_alone_and_its_own_ends_the_request() -> None:
    stage = Stage()
    worker = stage.worker()
    frontend = stage.frontend()
    frontend.submit(PROMPT, stage.now, max_tokens=2, stop=False)
    stage.run()
    worker.nan_tokens = {50}
    good, bad = (frontend.submit([*PROMPT, last], stage.now, max_tokens=6, stop=False) for last in (40, 50))
    stage.run()
    assert good.complete
    assert bad.failed is not None
    assert (bad.failed.status, bad.failed.code) == (500, "nan")
    assert stage.counters["scheduler_nan_rows"] == 2
    frontend.verify()
    worker.nan_tokens = set()
    stage.run()
    again = frontend.submit([*PROMPT, 50], stage.now, max_tokens=6, stop=False)
    stage.run()
    assert again.complete
    frontend.verify()


def test_what_ended_by_a_siblings_nan_does_not_wait_again() -> None:
    stage = Stage()
    worker = stage.worker(slots=4)
    stream = stage.frontend().submit(list(range(1, 7)), stage.now, 30, n=2, stop=False)
    for _ in range(4):
        stage.turn()
    known = stage.engine.workers[worker.session]
    (request,) = stage.engine.ledger.requests.values()
    stage.plan()
    broken, drained = request.choices
    broken.no_hits = True  # it has been computed alone already
    preempt(known, drained)
    assert drained.state is State.DRAINING
    while worker.plans:
        result = worker.run(worker.plans.popleft())
        if not worker.plans:
            row = known.in_flight[0].slots.tolist().index(broken.slot)
            flags, counts, ids = bytearray(result.flags), unpack(result.counts).tolist(), unpack(result.ids).tolist()
            flags[row], counts[row] = NAN, 0
            del ids[row]
            result = replace(result, flags=bytes(flags), counts=pack(counts), ids=pack(ids))
        stage.engine.worker_message(worker.session, result, stage.now)
    assert request.ended
    assert [choice.state for choice in request.choices] == [State.ENDED] * 2
    assert not known.queue
    stage.run()
    assert stream.failed is not None
