"""Preemption by swap: what leaves for host memory comes back as it was."""

from __future__ import annotations

from protocol.columns import unpack
from protocol.messages import Plan
from scheduler_svc.costs import Costs
from tests.scheduler_svc.fake_frontend import FakeFrontend, Stream
from tests.scheduler_svc.fake_worker import FakeWorker
from tests.scheduler_svc.formulas import digest, expected
from tests.scheduler_svc.play import Stage

PROMPT = list(range(1, 9))  # two blocks of 4


def stage_with(blocks: int = 10, host_blocks: int = 16, **settings: object) -> tuple[Stage, FakeWorker, FakeFrontend]:
    """Two long sequences are more than `blocks` hold."""
    stage = Stage(preemption=settings.pop("preemption", "swap"), **settings)
    worker = stage.worker(blocks=blocks, host_blocks=host_blocks)
    for model in stage.engine.models.values():
        model.outputs.expected = 1
        model.outputs.add = lambda length: None  # type: ignore[method-assign]
    return stage, worker, stage.frontend()


def two_long(stage: Stage, frontend: FakeFrontend) -> list[Stream]:
    return [frontend.submit([i, *PROMPT[1:]], stage.now, max_tokens=20, stop=False, seed=i) for i in (1, 2)]


def until_out(stage: Stage) -> Plan:
    """Turn until a plan has a swap-out."""
    for _ in range(60):
        if plans := [plan for plan in stage.plans if plan.out_to]:
            return plans[0]
        stage.turn()
    raise AssertionError("nothing was swapped out")


def test_a_swapped_sequence_goes_on_with_the_same_tokens_and_computes_none_again() -> None:
    stage, worker, frontend = stage_with(enable_prefix_caching=False)
    streams = two_long(stage, frontend)
    stage.run()
    frontend.verify()
    assert all(stream.complete for stream in streams)
    assert worker.written == 2 * (len(PROMPT) + 19)
    stats = stage.engine.stats()
    assert stats["swaps_out"] == stats["swaps_in"] == stats["preemptions"] > 0
    assert stats["host_blocks_used"] == 0


def test_blocks_under_a_copy_are_nobodys_until_the_copy_is_acknowledged() -> None:
    stage, worker, frontend = stage_with()
    two_long(stage, frontend)
    plan = until_out(stage)
    leaving = set(unpack(plan.out_from).tolist())
    while worker.plans:
        worker.run(worker.plans.popleft())  # nobody hears of it
    for _ in range(3):
        stage.turn()
    stage.engine.check()
    later = [p for p in stage.plans if p.step >= plan.step]
    assert not leaving & {block for p in later for block in unpack(p.assign_blocks).tolist()}
    assert stage.engine.workers[worker.session].host.coming == len(leaving)


def test_a_swap_out_stands_behind_every_row_of_its_sequence() -> None:
    stage, _, frontend = stage_with(depth=4)
    two_long(stage, frontend)
    plan = until_out(stage)
    stage.run()
    computed = len(unpack(plan.out_from)) * 4
    before = [p for p in stage.plans if p.step < plan.step]
    slot = next(
        s for p in before for s, n in zip(unpack(p.assign_slots), unpack(p.assign_blocks), strict=True) if n in unpack(plan.out_from)
    )
    rows = [
        start + count
        for p in before
        for s, start, count in zip(unpack(p.slots), unpack(p.starts), unpack(p.counts), strict=True)
        if s == slot
    ]
    assert computed - 4 < max(rows) <= computed
    assert slot not in unpack(plan.slots)


def seed_of_length(prompt: list[int], length: int) -> int:
    """A seed with which a stop id ends the output at this length."""
    return next(seed for seed in range(10_000) if len(expected(prompt, digest(seed, 0), 40)) == length)


def test_an_end_among_the_late_rows_voids_the_swap() -> None:
    voided = 0
    for length in range(6, 16):
        stage, _, frontend = stage_with(blocks=10)
        frontend.submit([1, *PROMPT[1:]], stage.now, max_tokens=20, stop=False)
        prompt = [2, *PROMPT[1:]]
        frontend.submit(prompt, stage.now, max_tokens=30, seed=seed_of_length(prompt, length))
        stage.run()
        frontend.verify()
        stats = stage.engine.stats()
        assert stats["requests_finished"] == 2
        assert stats["host_blocks_used"] == 0
        voided += stats["swaps_out"] == 1 and stats["swaps_in"] == 0
    assert voided, "no sequence ended among the rows in flight"


def test_an_abort_of_a_swapped_sequence_gives_its_host_blocks_back() -> None:
    stage, _, frontend = stage_with()
    streams = two_long(stage, frontend)
    until_out(stage)
    for _ in range(4):
        stage.turn()
    assert stage.engine.stats()["host_blocks_used"] > 0
    frontend.abort(streams[1], stage.now)
    stage.run()
    assert stage.engine.stats()["host_blocks_used"] == 0
    frontend.verify()


def test_a_swapped_sequence_whose_worker_is_lost_waits_for_another() -> None:
    stage, worker, frontend = stage_with()
    streams = two_long(stage, frontend)
    until_out(stage)
    for _ in range(4):
        stage.turn()
    stage.workers.pop(worker.session)
    worker.close(stage.now)
    stage.engine.check()
    stage.worker(incarnation=2)
    stage.run()
    frontend.verify()
    assert all(stream.complete for stream in streams)


def test_what_comes_back_is_sealed_again() -> None:
    stage, worker, frontend = stage_with(blocks=10)
    two_long(stage, frontend)
    stage.run()
    back = next(plan for plan in stage.plans if plan.in_to)
    later = {block for plan in stage.plans if plan.step > back.step for block in unpack(plan.seals).tolist()}
    assert set(unpack(back.in_to).tolist()[:1]) <= later
    assert worker.hashes


def test_what_is_still_on_the_device_is_not_copied_back() -> None:
    stage, _, frontend = stage_with(blocks=12)
    two_long(stage, frontend)
    plan = until_out(stage)
    stage.run()
    back = [p for p in stage.plans if p.in_to]
    assert len(b"".join(p.in_to for p in back)) < len(plan.out_to)
    frontend.verify()


def test_without_host_blocks_everything_is_recomputed() -> None:
    stage, _, frontend = stage_with(host_blocks=0)
    two_long(stage, frontend)
    stage.run()
    frontend.verify()
    assert stage.engine.stats()["preemptions"] > 0
    assert stage.engine.stats()["swaps_out"] == 0


def test_the_cheaper_of_swap_and_recompute_is_taken_by_measurement() -> None:
    costs = Costs()
    assert costs.prefers_copies(20, 160), "tried, so that it is measured"
    for _ in range(50):
        costs.took(0.005, 0, 0)
        costs.took(0.005 + 1000 * 20e-6, 1000, 0)
    for _ in range(50):
        costs.took(0.005 + 100 * 40e-6, 0, 100)
    assert costs.prefers_copies(20, 160), "0.8 ms against 3.2 ms"
    for _ in range(50):
        costs.took(0.005 + 100 * 400e-6, 0, 100)
    assert not costs.prefers_copies(20, 160), "8 ms against 3.2 ms"


def test_a_step_of_copies_and_more_says_nothing_of_a_copy_before_the_rest_has_been_measured():
    costs = Costs()
    costs.took(0.3, 2048, 64)  # a new scheduler's first step, with much found on the host
    for _ in range(50):
        costs.took(0.005, 0, 0)
        costs.took(0.005 + 1000 * 20e-6, 1000, 0)
    assert costs.prefers_copies(100, 1600)


def test_nan_of_a_swapped_sequence_takes_its_hashes_back() -> None:
    stage, worker, frontend = stage_with()
    two_long(stage, frontend)
    until_out(stage)
    worker.nan_tokens = {2}  # in both prompts
    stage.run()
    assert all(stream.failed is not None and stream.failed.code == "nan" for stream in frontend.streams.values())
    assert stage.engine.stats()["host_blocks_used"] == 0
