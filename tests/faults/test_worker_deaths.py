"""Workers are killed, at any moment; clients see a pause."""

from __future__ import annotations

import time

import pytest

from gpu_worker.faults import PHASES
from tests.e2e.stack import eventually
from tests.faults.fleet import Fleet, serving
from tests.faults.load import Load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

EVERY_STEP = ("plan_received", "step_started", "forward_done", "result_unsent")


def ends_well(running: Fleet, load: Load) -> None:
    """What every scenario ends with: all bytes right, everything given back, one ending each."""
    load.finish()
    running.at_rest()
    running.answered(load)


def test_one_of_two_workers_is_killed_in_the_midst_of_decoding() -> None:
    with serving() as (running, load):
        running.kill("worker-0")
        eventually(lambda: running.sum("workers_ready", "scheduler") == 1)
        ends_well(running, load)
        # whom a standstill of the machine cost its session, too, has closed it on its own side
        assert 1 <= running.total("wire_scheduler_workers_lost") <= 1 + running.total("wire_session_closed", "worker")


def test_the_only_worker_is_replaced_after_five_seconds() -> None:
    with serving(workers=1) as (running, load):
        killed = running.kill("worker-0")
        eventually(lambda: running.sum("workers_ready", "scheduler") == 0)

        def newest() -> float:
            return max(time for seen in list(load.seen) for time in seen.times[-1:])

        eventually(lambda: newest() < time.monotonic() - 2)  # what was on its way has arrived; nobody goes on without a worker
        time.sleep(3)
        waiting = [seen for seen in load.seen if seen.times and not seen.done]
        running.worker("worker-1")
        ends_well(running, load)
        assert len(waiting) > 12
        assert min(seen.pause(killed) or 0 for seen in waiting) > 4


@pytest.mark.parametrize("phase", PHASES)
def test_a_worker_dies_at_the_phase(phase: str, tmp_path) -> None:
    fired = tmp_path / "fired"
    often = 40 if phase in EVERY_STEP else 12
    switch = {"PAGEWIRE_KILL": f"{phase}:{often}:{fired}"}
    with serving(worker_env=switch, max_tokens=40) as (running, load):
        eventually(fired.exists)
        running.services["worker-0"].popen.wait(60)
        assert running.services["worker-0"].popen.returncode == -9
        running.worker("worker-0", env=switch)  # it lives: the switch has fired
        eventually(lambda: running.sum("workers_ready", "scheduler") == 2)
        ends_well(running, load)


def test_workers_are_killed_every_three_seconds() -> None:
    with serving() as (running, load):
        for i in range(8):
            name = f"worker-{i % 2}"
            eventually(lambda name=name: running.state(name) == "ready")
            killed = running.kill(name)
            running.worker(name)
            time.sleep(max(0.0, killed + 3 - time.monotonic()))
        eventually(lambda: running.total("wire_scheduler_workers_lost") >= 4)
        ends_well(running, load)
