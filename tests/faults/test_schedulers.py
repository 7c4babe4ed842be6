"""The scheduler dies, alone or with a worker, or stops while a standby takes over."""

from __future__ import annotations

import time
from typing import Any

import pytest

from protocol.rundir import RunDir
from tests.e2e.stack import eventually
from tests.faults.fleet import fleet, serving
from tests.faults.load import Load

BLOCK = 16  # tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_the_scheduler_is_killed_and_back_two_seconds_later() -> None:
    with serving() as (running, load):
        running.fresh()
        cached = running.sum("blocks_cached", "scheduler")
        killed = running.kill("scheduler-0")
        time.sleep(max(0.0, killed + 2 - time.monotonic()))
        running.scheduler()
        load.finish()
        running.at_rest()
        running.answered(load)
        # What the workers had sealed is found again by its hash rather than computed again.
        assert running.figure("scheduler-0", "wire_scheduler_blocks_adopted") >= 0.9 * cached > 0
        assert running.figure("scheduler-0", "prefix_hits") > 0


def long_body(i: int, max_tokens: int) -> dict[str, Any]:
    """A request of many blocks, none of which another one shares."""
    return {"prompt": f"{i} says " + "this is a prompt of many blocks " * 12, "max_tokens": max_tokens, "seed": i, "ignore_eos": True}


def growing_body(i: int, max_tokens: int) -> dict[str, Any]:
    """A request whose prompt is short beside its answer."""
    return {"prompt": f"request {i} says what a prompt of four blocks says: ", "max_tokens": max_tokens, "seed": i, "ignore_eos": True}


def test_nine_in_ten_sealed_blocks_that_lived_are_hit_after_the_scheduler_was_killed() -> None:
    with fleet(step=0.08) as running:
        running.scheduler()
        for i in range(2):
            running.worker(f"worker-{i}")
        running.frontend()
        running.ready(2)
        load = Load(running.urls, 24, max_tokens=150, rounds=1, bodies=long_body)  # 12 s: they outlast a machine that stands still
        eventually(lambda: load.streaming == 24)
        running.fresh()
        # The last block of each running sequence is not full. What is sealed after these figures makes 1 in 20 more.
        sealed = running.figure("scheduler-0", "blocks_used") - running.figure("scheduler-0", "requests_running")
        running.kill("scheduler-0")
        running.scheduler()
        load.finish()
        running.at_rest()
        running.answered(load)
        hit = running.figure("scheduler-0", "prefix_hits") / BLOCK
        assert hit >= 0.9 * sealed > 24 * 20, (hit, sealed)


def test_what_was_swapped_out_is_brought_back_from_the_host_after_the_scheduler_was_killed() -> None:
    with fleet(step=0.02) as running:
        running.scheduler("scheduler-0", "--preemption", "swap")
        running.worker("worker-0", "--num-gpu-blocks", "64", "--max-model-len", "1024", "--num-cpu-blocks", "256")
        running.frontend()
        running.ready(1)
        # Short answers first, so that it expects them to be short and lets more begin than will fit.
        short = Load(running.urls, 8, max_tokens=2, rounds=4, bodies=growing_body)
        short.finish()
        load = Load(running.urls, 12, max_tokens=200, rounds=1, bodies=growing_body)
        eventually(lambda: running.figure("scheduler-0", "host_blocks_used") >= 8)
        running.kill("scheduler-0")
        running.scheduler("scheduler-0", "--preemption", "swap")
        load.finish()
        running.at_rest()
        assert running.figure("scheduler-0", "wire_scheduler_host_blocks_adopted") >= 4
        assert running.figure("scheduler-0", "host_hits") >= 4 * BLOCK
        eventually(lambda: running.figure("scheduler-0", "host_blocks_used") == 0)


def test_scheduler_and_a_worker_are_killed_together() -> None:
    with serving() as (running, load):
        running.kill("worker-0")
        running.kill("scheduler-0")
        running.scheduler()
        running.worker("worker-0")
        load.finish()
        running.at_rest()
        running.answered(load)


def test_the_scheduler_is_stopped_while_a_standby_takes_over_and_stays_fenced_when_it_wakes() -> None:
    with fleet(factor=2) as running:  # the standby time is 6 s: who stands still for less is not relieved
        running.scheduler()
        sockets = RunDir(running.stack.run_dir).sockets
        endpoints = {role: f"ipc://{sockets}/standby-{role}.sock" for role in ("frontends", "workers")}
        binds = ("--bind-frontends", endpoints["frontends"], "--bind-workers", endpoints["workers"])
        running.scheduler("scheduler-1", "--standby", *binds)
        for i in range(2):
            running.worker(f"worker-{i}", "--scheduler", running.rundir.workers, "--scheduler", endpoints["workers"])
        running.frontend("frontend-0", "--scheduler", running.rundir.frontends, "--scheduler", endpoints["frontends"])
        running.ready(2)
        eventually(lambda: running.state("scheduler-1") == "standby")
        load = Load(running.urls)
        load.well_underway()
        with running.stopped("scheduler-0") as began:
            eventually(lambda: running.state("scheduler-1") == "ready")
            time.sleep(max(0.0, began + 10 - time.monotonic()))
            eventually(lambda: load.pauses(began))  # somebody goes on
        eventually(lambda: running.state("scheduler-0") == "standby")
        # Both workers have left the one that was stopped; whom the other one lost has left it, too.
        eventually(
            lambda: running.figure("scheduler-1", "wire_scheduler_workers_lost") <= running.total("wire_session_closed", "worker") - 2
        )
        load.finish()
        assert running.state("scheduler-1") == "ready", "the one that woke has taken over again"
        running.at_rest()
        running.answered(load)
        assert running.figure("scheduler-0", "workers_ready") == 0
