"""Workers that come, go, hang, fail, and lie."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from protocol.columns import pack, unpack
from protocol.messages import NAN, Phase, Progress, Result, SamplingParams
from scheduler_svc.preemption import preempt
from scheduler_svc.requests import Choice, State
from scheduler_svc.waiting import Queue
from tests.scheduler_svc.fake_frontend import Stream
from tests.scheduler_svc.fake_worker import FakeWorker
from tests.scheduler_svc.play import Stage

PROMPT = list(range(1, 19))


def lose(stage: Stage, worker: FakeWorker) -> None:
    stage.workers.pop(worker.session)
    worker.close(stage.now)
    stage.deliver()
    stage.engine.check()


def test_a_lost_workers_requests_go_on_elsewhere_from_their_known_tokens() -> None:
    stage = Stage()
    first = stage.worker(incarnation=1)
    frontend = stage.frontend()
    streams = [frontend.submit([i, *PROMPT], stage.now, max_tokens=20, n=1 + i % 2, stop=False) for i in range(4)]
    for _ in range(5):
        stage.turn()
    stage.worker(incarnation=2)
    lose(stage, first)
    stage.run()
    frontend.verify()
    assert all(stream.complete for stream in streams)


def test_sealed_blocks_of_a_worker_that_returns_are_hit() -> None:
    stage = Stage()
    worker = stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT * 4, stage.now, max_tokens=40, stop=False)
    for _ in range(20):
        stage.turn()
    lose(stage, worker)
    sealed = len(worker.hashes)
    assert sealed >= (len(PROMPT) * 4 + 14) // 4
    worker.written = 0
    known = len(PROMPT) * 4 + len(stream.known[0])
    stage.reopen(worker)
    worker.ready(stage.now)
    assert stage.engine.stats()["blocks_cached"] == sealed
    stage.plan()
    worker.step(stage.now)
    assert worker.written <= known - 4 * sealed + 1 <= 8
    stage.run()
    frontend.verify()
    assert stream.cached == 0, "cached tokens are those of the first admission"


def test_blocks_sealed_last_are_told_when_the_work_is_done() -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend().submit(PROMPT, stage.now, max_tokens=6, stop=False)
    stage.run()
    assert len(worker.hashes) == stage.engine.stats()["blocks_cached"] == (len(PROMPT) + 5) // 4


def test_load_is_spread_and_a_cached_prefix_attracts() -> None:
    stage = Stage()
    workers = [stage.worker(incarnation=i) for i in (1, 2)]
    frontend = stage.frontend()
    for i in range(6):
        frontend.submit([30 + i] * 17, stage.now, max_tokens=3, stop=False)
    stage.run()
    assert all(worker.written > 40 for worker in workers)
    for i in range(6):
        frontend.submit([30 + i] * 17, stage.now, max_tokens=3, stop=False)
    stage.run()
    assert stage.counters["scheduler_prefix_hits"] == 6 * 16


def test_an_idle_worker_takes_from_the_queue_of_a_full_one() -> None:
    stage = Stage()
    stage.worker(incarnation=1, slots=1)
    frontend = stage.frontend()
    for i in range(6):
        frontend.submit([30 + i] * 17, stage.now, max_tokens=30, stop=False)
    stage.turn()
    late = stage.worker(incarnation=2, slots=8)
    for _ in range(12):
        stage.turn()
    assert late.written > 0
    stage.run()
    frontend.verify()


def test_results_that_answer_no_plan_end_the_session() -> None:
    for result in (
        Result(1, b"", b"", b""),
        Result(7, pack([1]), pack([3]), b"\0"),
        Result(1, pack([1, 1]), pack([3, 3]), b"\0\0"),
        Result(1, pack([0]), b"", b"\0"),
        Result(1, pack([0]), b"", b"\4"),
    ):
        stage = Stage()
        worker = stage.worker()
        frontend = stage.frontend()
        stream = frontend.submit(PROMPT, stage.now)
        stage.plan()
        stage.engine.worker_message(worker.session, result, stage.now)
        stage.deliver()
        assert worker.session not in stage.workers
        stage.reopen(worker)
        worker.ready(stage.now)
        stage.run()
        assert stream.complete
        frontend.verify()


# ---------------------------------------------------------------- progress


def test_a_step_without_progress_ends_the_session() -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend().submit(PROMPT, stage.now)
    stage.plan()
    end = stage.now + stage.settings.times.progress
    while stage.now < end - 0.1:
        stage.now += 0.05
        stage.engine.tick(stage.now)
    assert not stage.engine.fence
    stage.now = end + 0.01
    stage.engine.tick(stage.now)
    assert [session for session, _ in stage.engine.fence] == [worker.session]


def test_a_counter_that_moves_is_progress_however_long_the_step() -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend().submit(PROMPT, stage.now)
    stage.plan()
    for i in range(200):
        stage.now += 0.04
        stage.engine.worker_message(worker.session, Progress(1, i), stage.now)
        stage.engine.tick(stage.now)
    assert not stage.engine.fence


def test_an_idle_worker_and_an_announced_phase_are_not_hung() -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend()
    for _ in range(200):
        stage.turn(0.04)
    stage.engine.worker_message(worker.session, Phase("capture"), stage.now)
    next(iter(stage.frontends.values())).submit(PROMPT, stage.now)
    stage.plan()
    for _ in range(200):
        stage.now += 0.04
        stage.engine.tick(stage.now)
    assert not stage.engine.fence


def test_a_judge_that_comes_late_waits_as_long_again() -> None:
    stage = Stage()
    stage.worker()
    stage.frontend().submit(PROMPT, stage.now)
    stage.plan()
    stage.now += 10  # this process was stopped
    stage.engine.tick(stage.now)
    assert not stage.engine.fence
    assert stage.now < stage.engine.next_time() <= stage.now + 10


# ---------------------------------------------------------------- poison and NaN


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
            lose(stage, worker)
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
        lose(stage, worker)
        stage.reopen(worker)
        assert not stage.engine.suspects.active
        worker.ready(stage.now)
    stage.run()
    assert stream.complete
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


def test_logprobs_are_split_among_frontends() -> None:
    stage = Stage()
    worker = stage.worker()
    frontends = [stage.frontend(incarnation=100 + i) for i in range(2)]
    seen: list[tuple[int, bytes, bytes, bytes]] = []
    stage.deliver()
    for i, frontend in enumerate(frontends):
        frontend.submit([i, 2, 3], stage.now, max_tokens=2, stop=False)
        frontend.take = lambda m, now, i=i: seen.append((i, m.lp_counts, m.lp_ids, m.lp_ranks))  # type: ignore[method-assign]
    stage.plan()
    plain = worker.run(worker.plans.popleft())
    pairs = {"lp_counts": pack([1, 2]), "lp_ids": pack([5, 6, 7]), "lp_values": bytes(12), "lp_ranks": pack([1, 2])}
    result = Result(plain.step, plain.counts, plain.ids, plain.flags, **pairs)
    stage.engine.worker_message(worker.session, result, stage.now)
    stage.deliver()
    assert seen == [(0, pack([1]), pack([5]), pack([1])), (1, pack([2]), pack([6, 7]), pack([2]))]


def test_a_journal_that_lacks_tokens_with_logprobs_gets_them_sampled_again() -> None:
    stage = Stage()
    worker = stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, max_tokens=12, stop=False)
    request = stage.engine.ledger.requests[stream.submit.request]
    request.params = SamplingParams(12, logprobs=1)
    for _ in range(3):
        stage.turn()
    stage.frontends.pop(frontend.session)
    frontend.close(stage.now)
    for _ in range(3):
        stage.turn()
    choice: Choice = request.choices[0]
    assert len(choice.known) > len(stream.known[0])
    stage.reopen(frontend)
    frontend.resubmit(stage.now)
    assert len(choice.known) == len(stream.known[0])
    assert worker.records
    stage.run()
    assert stream.complete
    frontend.verify()


def test_a_worker_that_returns_empty_takes_what_waits_at_the_other_at_once() -> None:
    stage = Stage()
    stage.worker(incarnation=1, slots=4)
    frontend = stage.frontend()
    streams = [frontend.submit([i, *PROMPT], stage.now, max_tokens=20, n=2, stop=False) for i in range(6)]
    for _ in range(3):
        stage.turn()
    returned = stage.worker(incarnation=2, slots=4)
    stage.turn()
    assert stage.engine.workers[returned.session].running == 4
    stage.run()
    frontend.verify()
    assert all(stream.complete for stream in streams)


def test_a_worker_that_returns_empty_takes_new_load_though_the_prefix_is_at_the_other() -> None:
    stage = Stage()
    first, second = (stage.worker(incarnation=i, slots=8, blocks=4000) for i in (1, 2))
    frontend = stage.frontend()
    common = PROMPT * 3

    def come(count: int) -> None:
        for i in range(count):
            frontend.submit([*common, i % 50], stage.now, max_tokens=60, stop=False)
            stage.turn()

    come(6)
    lose(stage, first)
    first.hashes.clear()
    first.kv.clear()
    first.incarnation = 3
    for _ in range(10):  # those whose step was lost run on their own at first
        stage.turn()
    assert stage.engine.workers[second.session].running == 6
    stage.reopen(first)
    first.ready(stage.now)
    come(6)
    running = [stage.engine.workers[worker.session].running for worker in (first, second)]
    assert sum(running) == 12
    assert abs(running[0] - running[1]) <= 2
    stage.run()
    frontend.verify()


def lost_with_a_long_prefix(seconds_per_token: float) -> tuple[Stage, FakeWorker, FakeWorker, Stream]:
    """A worker is lost; the other one takes so long to compute a token of a prompt."""
    stage = Stage()
    first = stage.worker(incarnation=1)
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT * 4, stage.now, max_tokens=12, stop=False)
    for _ in range(5):
        stage.turn()
    second = stage.worker(incarnation=2)
    stage.engine.workers[second.session].costs.token = seconds_per_token
    lose(stage, first)
    stage.turn()
    return stage, first, second, stream


def test_a_prefix_that_takes_longer_to_compute_than_the_move_time_waits_for_its_worker() -> None:
    stage, first, second, stream = lost_with_a_long_prefix(seconds_per_token=0.2)  # 14 s for 72 tokens
    for _ in range(5):
        stage.turn(0.5)
    assert second.written == 0
    before = first.written
    stage.reopen(first)
    first.ready(stage.now)
    stage.run()
    assert stream.complete
    assert second.written == 0
    assert first.written - before <= 12 + 8, "its blocks were found"


def test_it_waits_for_its_worker_no_longer_than_the_move_time() -> None:
    stage, _, second, stream = lost_with_a_long_prefix(seconds_per_token=0.2)
    stage.turn(stage.settings.times.move - 0.1)
    assert second.written == 0
    stage.turn(0.2)
    stage.run()
    assert stream.complete
    assert second.written > len(PROMPT) * 4


def test_a_prefix_that_is_soon_computed_again_waits_for_nobody() -> None:
    stage, _, second, stream = lost_with_a_long_prefix(seconds_per_token=0.1)
    stage.turn()
    assert second.written > 0
    stage.run()
    assert stream.complete


@pytest.mark.slow
def test_two_workers_without_room_do_not_throw_their_queues_at_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(routing="round-robin")
    sizes = {"blocks": 40, "slots": 128, "max_step_tokens": 64, "max_model_len": 128}
    first, second = (stage.worker(incarnation=i, **sizes) for i in (1, 2))
    frontend = stage.frontend()
    streams = [frontend.submit([1 + (7 * i + j) % 50 for j in range(40)], stage.now, 60, stop=False, seed=i) for i in range(6)]
    for _ in range(6):
        stage.turn()
    streams += [frontend.submit([1 + (3 * i + j) % 50 for j in range(60)], stage.now, 60, stop=False, seed=100 + i) for i in range(120)]
    for _ in range(13):
        stage.turn()
    one, other = (stage.engine.workers[worker.session] for worker in (first, second))
    for choice in list(one.queue):
        one.queue.remove(choice)
        other.queue.add(choice)
    moves = []
    add = Queue.add
    monkeypatch.setattr(Queue, "add", lambda queue, choice: (moves.append(choice), add(queue, choice)))
    waiting = len(other.queue)
    for _ in range(20):
        stage.turn()
    assert len(moves) < 2 * waiting
    stage.run()
    assert all(stream.complete for stream in streams)
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
