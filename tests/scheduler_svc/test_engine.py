"""What the engine does in a request's life, one sentence each."""

from __future__ import annotations

from protocol.columns import pack, unpack
from protocol.messages import Abort, Plan
from scheduler_svc.planner import ADMITTED
from tests.scheduler_svc.play import PROMPT, Stage


def rows(plan: Plan) -> int:
    return len(plan.slots) // 4


def test_a_request_gets_its_tokens_and_ends() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now)
    stage.run()
    frontend.verify()
    assert stream.complete
    assert stage.engine.stats()["requests_finished"] == 1
    assert stage.engine.stats()["blocks_used"] == 0


def test_two_plans_are_in_flight_and_never_more() -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend().submit(PROMPT, stage.now, max_tokens=10, stop=False)
    assert stage.plan()
    assert len(worker.plans) == 2
    assert not stage.plan()
    worker.step(stage.now)
    assert stage.plan()
    assert len(worker.plans) == 2


def test_nothing_is_planned_beyond_the_last_token() -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend().submit(PROMPT, stage.now, max_tokens=3, stop=False)
    stage.run()
    assert worker.written == len(PROMPT) + 2
    assert [rows(plan) for plan in stage.plans] == [1, 1, 1, 0]  # the last one seals and frees


def test_chunks_of_a_long_prefill_run_beside_decodes() -> None:
    stage = Stage()
    stage.worker(max_step_tokens=8)
    frontend = stage.frontend()
    frontend.submit([5], stage.now, max_tokens=20, stop=False)
    stage.plan()
    frontend.submit(list(range(1, 31)), stage.now, max_tokens=2)
    stage.run()
    frontend.verify()
    assert [sorted(unpack(plan.counts).tolist()) for plan in stage.plans[2:6]] == [[1, 7]] * 4


def test_a_step_admits_some_of_a_burst_and_the_next_one_more() -> None:
    stage = Stage()
    stage.worker(slots=2 * ADMITTED, blocks=8 * ADMITTED, max_step_tokens=8 * ADMITTED)
    frontend = stage.frontend()
    for i in range(ADMITTED + 5):
        frontend.submit([i], stage.now, max_tokens=4, stop=False)
    stage.run()
    frontend.verify()
    assert [len(plan.bind_slots) // 4 for plan in stage.plans[:3]] == [ADMITTED, 5, 0]


def test_a_prefill_threshold_bounds_a_chunk() -> None:
    stage = Stage(long_prefill_token_threshold=6)
    stage.worker()
    stage.frontend().submit(PROMPT, stage.now, max_tokens=1)
    stage.run()
    assert [unpack(plan.counts).tolist() for plan in stage.plans[:3]] == [[6]] * 3


def test_a_second_identical_prompt_computes_its_last_block_only() -> None:
    stage = Stage()
    worker = stage.worker()
    frontend = stage.frontend()
    prompt = PROMPT[:16]
    frontend.submit(prompt, stage.now, max_tokens=1)
    stage.run()
    worker.written = 0
    stream = frontend.submit(prompt, stage.now, max_tokens=1)
    stage.run()
    assert worker.written == 4
    assert stream.cached == 12
    frontend.verify()


def test_a_salt_keeps_tenants_apart() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    frontend.submit(PROMPT, stage.now, max_tokens=1, cache_salt=b"a")
    stage.run()
    stream = frontend.submit(PROMPT, stage.now, max_tokens=1, cache_salt=b"b")
    stage.run()
    assert stream.cached == 0


def test_a_burst_with_one_prefix_computes_it_once_in_one_plan() -> None:
    stage = Stage()
    worker = stage.worker(max_step_tokens=64)
    frontend = stage.frontend()
    for i in range(4):
        frontend.submit([*PROMPT[:16], 40 + i], stage.now, max_tokens=2, stop=False)
    stage.plan()
    assert unpack(stage.plans[0].counts).tolist() == [17, 1, 1, 1]
    stage.run()
    frontend.verify()
    assert worker.written == 17 + 3 + 4


def test_n_choices_share_the_prompt_and_copy_only_the_partial_block() -> None:
    stage = Stage()
    worker = stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, n=4, max_tokens=2, stop=False)
    stage.plan()
    assert stage.engine.stats()["blocks_used"] == 4 + 4
    assert len(unpack(stage.plans[0].fork_slots)) == 3
    assert len(unpack(stage.plans[1].copy_to)) == 3
    stage.run()
    assert worker.written == len(PROMPT) + 4
    assert stream.complete
    frontend.verify()


def test_forks_without_a_slot_wait_and_find_the_prefix() -> None:
    stage = Stage()
    worker = stage.worker(slots=2)
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, n=5, max_tokens=4, stop=False)
    stage.run()
    assert stream.complete
    frontend.verify()
    assert worker.written < len(PROMPT) * 3


def test_blocks_of_an_aborted_request_are_free_for_the_next_plan() -> None:
    stage = Stage()
    stage.worker(blocks=8)
    frontend = stage.frontend()
    first = frontend.submit(PROMPT, stage.now, max_tokens=14, stop=False)
    stage.plan()
    second = frontend.submit([50] * 18, stage.now, max_tokens=14, stop=False)
    stage.turn()
    assert rows(stage.plans[-1]) == 1
    frontend.abort(first, stage.now)
    stage.plan()
    assert len(stage.plans[-1].frees) == 4
    assert len(unpack(stage.plans[-1].assign_blocks)) == 5
    stage.run()
    assert second.complete
    frontend.verify()


def test_an_abort_may_name_a_single_choice() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, n=2, max_tokens=30, stop=False)
    stage.turn()
    frontend.send(Abort(stream.submit.request, pack([1])), stage.now)
    stage.run()
    frontend.verify()
    assert len(stream.known[0]) == 30
    assert len(stream.known[1]) < 5


def test_preemption_takes_the_newest_and_streams_stay_right() -> None:
    stage = Stage()
    stage.worker(blocks=12)
    frontend = stage.frontend()
    stage.engine.models["m"].outputs.expected = 1  # a wrong guess
    streams = [frontend.submit([10 + i] * 10, stage.now, max_tokens=30, stop=False) for i in range(3)]
    firsts: list[int] = []
    for _ in range(400):
        stage.turn()
        firsts += [i for i, stream in enumerate(streams) if stream.complete and i not in firsts]
    assert firsts == [0, 1, 2]
    assert stage.engine.stats()["preemptions"] > 0
    frontend.verify()


def test_nothing_is_admitted_in_a_step_that_preempted() -> None:
    stage = Stage()
    stage.worker(blocks=12)
    frontend = stage.frontend()
    stage.engine.models["m"].outputs.expected = 1  # a wrong guess
    for i in range(6):
        frontend.submit([10 + i] * 10, stage.now, max_tokens=30, stop=False)
    preemptions = 0.0
    for _ in range(300):
        count = len(stage.plans)
        stage.turn()
        now = stage.engine.stats()["preemptions"]
        if now > preemptions and len(stage.plans) == count + 1:
            assert not stage.plans[-1].bind_slots
        preemptions = now
    assert preemptions > 0


def test_a_preempted_request_sends_its_record_once() -> None:
    stage = Stage()
    stage.worker(blocks=12)
    frontend = stage.frontend()
    stage.engine.models["m"].outputs.expected = 1  # a wrong guess
    for i in range(3):
        frontend.submit([10 + i] * 10, stage.now, max_tokens=30, stop=False)
    stage.run()
    assert stage.engine.stats()["preemptions"] > 0
    assert sum(len(plan.admits) for plan in stage.plans) == 3


def test_a_frontend_that_stops_reading_exhausts_its_own_credit_only() -> None:
    stage = Stage(max_num_seqs=2)
    stage.worker(slots=4, blocks=40, max_model_len=160)
    silent, reading = stage.frontend(incarnation=100, silent=True), stage.frontend(incarnation=101)
    for i in range(2):
        silent.submit([10 + i] * 10, stage.now, max_tokens=100, stop=False)
    for _ in range(100):
        stage.turn()
    assert silent.unacked <= stage.engine.credit_limit == 32
    sent = silent.unacked
    stream = reading.submit([20] * 40, stage.now, max_tokens=60, stop=False)
    for _ in range(100):
        stage.turn()
    assert stream.complete, "held blocks and slots must be given up for a frontend with credit"
    assert silent.unacked == sent
    silent.silent, silent.unacked = False, 0
    stage.run()
    silent.verify()
    reading.verify()
    assert all(stream.complete for stream in silent.streams.values())


def test_a_priority_request_waits_no_longer_than_the_pipeline() -> None:
    stage = Stage(policy="priority")
    stage.worker(slots=2)
    frontend = stage.frontend()
    for _ in range(4):
        frontend.submit(PROMPT, stage.now, max_tokens=60, stop=False, priority=5)
    for _ in range(5):
        stage.turn()
    urgent = frontend.submit([7] * 9, stage.now, max_tokens=2, stop=False, priority=0)
    for _ in range(6):
        stage.turn()
    assert urgent.complete
    stage.run()
    frontend.verify()


def test_a_plan_smaller_than_the_decodes_gives_everyone_a_turn() -> None:
    stage = Stage()
    stage.worker(max_step_tokens=2)
    frontend = stage.frontend()
    stream = frontend.submit([1], stage.now, n=5, max_tokens=12, stop=False)
    for _ in range(9):
        stage.turn()
    lengths = [len(known) for known in stream.known]
    assert max(lengths) - min(lengths) <= 1
    stage.run()
    frontend.verify()
