"""Several workers: loss, return, routing, and who may take what waits."""

from __future__ import annotations

import pytest

from protocol.columns import pack
from protocol.messages import Geometry, Result, SamplingParams
from scheduler_svc.requests import Choice
from scheduler_svc.slots import Slots
from scheduler_svc.waiting import Queue
from tests.scheduler_svc.fake_frontend import Stream
from tests.scheduler_svc.fake_worker import FakeWorker
from tests.scheduler_svc.play import PROMPT, Stage


def test_a_lost_workers_requests_go_on_elsewhere_from_their_known_tokens() -> None:
    stage = Stage()
    first = stage.worker(incarnation=1)
    frontend = stage.frontend()
    streams = [frontend.submit([i, *PROMPT], stage.now, max_tokens=20, n=1 + i % 2, stop=False) for i in range(4)]
    for _ in range(5):
        stage.turn()
    stage.worker(incarnation=2)
    stage.lose(first)
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
    stage.lose(worker)
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


def test_a_worker_whose_columns_no_memory_holds_is_refused_and_the_others_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    stage.worker()

    def columns(geometry: Geometry, slots: int) -> Slots:
        if geometry.max_model_len > 1000:
            raise MemoryError
        return Slots(geometry, slots)

    monkeypatch.setattr("scheduler_svc.worker.Slots", columns)
    huge = stage.worker(max_model_len=1 << 30)
    ((session, reason),) = stage.engine.fleet.ending
    assert session == huge.session
    assert reason == f"8 slots of {1 << 30} tokens take more memory than the scheduler has"
    stage.deliver()
    assert huge.session not in stage.workers
    stream = stage.frontend().submit(PROMPT, stage.now, max_tokens=5, stop=False)
    stage.run()
    assert stream.complete


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
    stage.lose(first)
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
    stage.lose(first)
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
