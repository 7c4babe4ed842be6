"""Blocks in host memory are found by their names: after a lost session, and by whoever shares their prefix."""

from __future__ import annotations

import pytest

from protocol.columns import unpack
from scheduler_svc.blocks import BlockManager
from scheduler_svc.requests import Choice
from scheduler_svc.swap import HostBlocks
from tests.scheduler_svc.fake_worker import FakeWorker
from tests.scheduler_svc.play import Stage
from tests.scheduler_svc.test_swap import PROMPT, stage_with, two_long, until_out


def swapped_out(stage: Stage) -> None:
    """Turn until one of two long sequences is in host memory, the copy acknowledged."""
    until_out(stage)
    for _ in range(3):
        stage.turn()
    assert stage.engine.stats()["host_blocks_used"] > 0


def reopened(stage: Stage, worker: FakeWorker, device: bool = True) -> None:
    """The worker's session ends, and the same process opens another; its device blocks are listed again or not."""
    worker.close(stage.now)
    if not device:
        worker.hashes.clear()
        worker.kv.clear()
    stage.reopen(worker)
    worker.ready(stage.now)
    stage.plans.clear()


def hit(stage: Stage) -> int:
    """Blocks that were found in host memory by their names."""
    return int(stage.engine.stats()["host_hits"]) // 4


def test_a_swapped_sequence_whose_session_ended_finds_its_blocks_on_the_host() -> None:
    stage, worker, frontend = stage_with()
    streams = two_long(stage, frontend)
    swapped_out(stage)
    listed = len(worker.host_hashes)
    assert listed >= 4
    reopened(stage, worker, device=False)
    assert stage.counters["scheduler_host_blocks_adopted"] == stage.engine.stats()["host_blocks_cached"] == listed
    stage.run()
    frontend.verify()
    assert all(stream.complete for stream in streams)
    assert hit(stage) >= listed
    back = next(plan for plan in stage.plans if plan.in_from)
    assert len(unpack(back.in_from)) == listed
    assert unpack(back.starts)[-1] == 4 * listed, "it computes what it has brought back"


def test_another_schedulers_engine_finds_them_as_well() -> None:
    stage, worker, frontend = stage_with()
    two_long(stage, frontend)
    swapped_out(stage)
    successor, _, _ = stage_with()
    successor.workers.clear()
    for peer in (worker, frontend):
        peer.engine = successor.engine
        peer.session = successor.session()
        peer.open(successor.now)
    successor.workers[worker.session], successor.frontends[frontend.session] = worker, frontend
    worker.kv.clear()
    worker.hashes.clear()
    worker.ready(successor.now)
    next(iter(successor.engine.models.values())).workers[:-1] = []
    frontend.resubmit(successor.now)
    successor.run()
    frontend.verify()
    assert hit(successor) >= 4


def test_what_the_device_has_is_taken_there_and_only_the_rest_from_the_host() -> None:
    stage, worker, frontend = stage_with()
    two_long(stage, frontend)
    swapped_out(stage)
    host = sorted(worker.host_hashes.values())
    for block in [block for block, name in worker.hashes.items() if name in host][2:]:
        del worker.hashes[block]
    reopened(stage, worker)
    stage.run()
    frontend.verify()
    assert hit(stage) > 0
    assert len(unpack(next(plan.in_from for plan in stage.plans if plan.in_from))) == len(host) - 2


def test_a_copy_that_was_not_acknowledged_is_not_listed_and_computed_again() -> None:
    stage, worker, frontend = stage_with()
    streams = two_long(stage, frontend)
    worker.lag = 5
    until_out(stage)
    stage.turn()
    assert not worker.host_hashes
    worker.lag = 0
    reopened(stage, worker, device=False)
    assert "scheduler_host_blocks_adopted" not in stage.counters
    stage.run()
    frontend.verify()
    assert all(stream.complete for stream in streams)


@pytest.mark.parametrize("block_seconds", [1e-5, 1.0])
def test_a_block_is_copied_only_where_that_is_cheaper_than_computing_it(block_seconds: float) -> None:
    stage, worker, frontend = stage_with(preemption="auto")
    two_long(stage, frontend)
    swapped_out(stage)
    reopened(stage, worker, device=False)
    costs = stage.engine.workers[worker.session].costs
    costs.token, costs.block = 0.01, block_seconds
    stage.run()
    frontend.verify()
    assert (hit(stage) > 0) == (block_seconds < 4 * costs.token)


def test_the_host_is_left_alone_where_recomputing_is_asked_for() -> None:
    stage, worker, frontend = stage_with()
    two_long(stage, frontend)
    swapped_out(stage)
    stage.engine.settings.__dict__["preemption"] = "recompute"
    reopened(stage, worker, device=False)
    stage.run()
    frontend.verify()
    assert hit(stage) == 0
    assert not any(plan.in_to or plan.out_to for plan in stage.plans)


def test_a_step_waits_for_so_many_copies_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler_svc.planner.HOST_HITS", 3)
    stage, worker, frontend = stage_with()
    two_long(stage, frontend)
    swapped_out(stage)
    assert len(worker.host_hashes) > 3
    reopened(stage, worker, device=False)
    stage.run()
    frontend.verify()
    assert len(unpack(next(plan.in_from for plan in stage.plans if plan.in_from))) == hit(stage) == 3


def test_a_host_block_keeps_its_name_when_its_sequence_has_gone_back() -> None:
    stage, worker, frontend = stage_with()
    two_long(stage, frontend)
    stage.run()
    stats = stage.engine.stats()
    assert stats["swaps_in"] == stats["swaps_out"] > 0
    assert stats["host_blocks_cached"] > 0
    reopened(stage, worker, device=False)
    for prompt in ([1, *PROMPT[1:], 9], [2, *PROMPT[1:], 9]):
        frontend.submit(prompt, stage.now, max_tokens=2)
    stage.run()
    frontend.verify()
    assert hit(stage) >= 2


def test_what_is_on_its_way_back_is_shared_on_the_device() -> None:
    stage, worker, frontend = stage_with(blocks=16)
    prompt = [*PROMPT, *PROMPT]
    frontend.submit([*prompt, 1], stage.now, max_tokens=2)
    stage.run()
    worker.lag = 2
    for host, (block, name) in enumerate(worker.hashes.items()):
        worker.host_hashes[host] = name
        worker.host.update({(host, offset): worker.kv[block, offset] for offset in range(4)})
    reopened(stage, worker, device=False)
    for token in (1, 2):
        frontend.submit([*prompt, token], stage.now, max_tokens=3, seed=token)
    stage.turn()
    assert len(unpack(stage.plans[0].in_to)) == len(unpack(stage.plans[0].share_blocks)) == 4
    stage.run()
    frontend.verify()
    assert hit(stage) == 4


def test_nan_takes_the_names_back_on_the_host_too() -> None:
    stage, worker, frontend = stage_with()
    two_long(stage, frontend)
    swapped_out(stage)
    reopened(stage, worker, device=False)
    assert stage.engine.stats()["host_blocks_cached"] > 0
    worker.nan_tokens = {2}  # in both prompts
    stage.run()
    assert all(stream.failed is not None and stream.failed.code == "nan" for stream in frontend.streams.values())
    assert stage.engine.stats()["host_blocks_cached"] == 0


def test_a_block_that_is_being_read_is_not_given_away() -> None:
    host = HostBlocks(3, BlockManager(8))
    assert host.pool.adopt(1, b"a")
    host.read([1], step=1)
    assert host.pool.available == 2
    host.swap_out(Choice.__new__(Choice), 8, host.blocks.take(2), 1)
    assert sorted(host.leaving[0].host) == [0, 2]
    host.check([])
    host.acknowledged(1)
    assert host.pool.match([b"a"], 1) == [1]
    assert host.pool.available == 1


def test_a_swap_takes_the_least_recently_used_names_first() -> None:
    host = HostBlocks(4, BlockManager(8))
    for block, name in enumerate((b"a", b"b", b"c")):
        assert host.pool.adopt(block, name)
    host.read([0], step=1)
    host.acknowledged(1)
    taken = host.blocks.take(2)
    host.swap_out(Choice.__new__(Choice), 8, taken, 1)
    assert set(host.pool.by_hash) == {b"c", b"a"}, "first the free one, then the one that was used longest ago"
    host.pool.check(host.leaving[0].host)
