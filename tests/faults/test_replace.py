"""Planned replacement: services leave and join while 48 streams run, and no client notices."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from protocol.rundir import RunDir
from tests.e2e.stack import Stack, eventually, stack
from tests.faults.fleet import serving
from tests.faults.load import Load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def command(made: Stack, *arguments: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    """Run `pagewire ARGUMENTS --run-dir …` to its end."""
    full = [sys.executable, "-P", "-m", "pagewire", *arguments, "--run-dir", str(made.run_dir)]
    return subprocess.run(full, capture_output=True, text=True, timeout=timeout)


def test_a_worker_is_drained_and_its_streams_go_on_at_the_other() -> None:
    with serving() as (running, load):
        eventually(lambda: running.figure("worker-0", "worker_tokens") > 0)
        drained = command(running.stack, "drain", "worker-0")
        assert drained.returncode == 0, drained.stderr
        assert "has left" in drained.stdout
        assert running.services["worker-0"].popen.wait(60) == 0
        load.finish()
        running.at_rest()
        running.answered(load)
        # A session that a standstill of the machine ended is closed on its worker's side as well.
        disturbed = running.total("wire_session_closed", "worker")
        assert 1 <= running.figure("scheduler-0", "wire_scheduler_workers_leaving") <= 1 + disturbed
        assert running.figure("scheduler-0", "wire_scheduler_workers_drained") == 1
        assert running.figure("scheduler-0", "wire_scheduler_workers_lost") <= disturbed


def test_the_only_worker_is_drained_and_serves_on_until_another_comes() -> None:
    with serving(workers=1) as (running, load):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pagewire", "drain", "worker-0", "--run-dir", str(running.stack.run_dir)],
            stdout=subprocess.DEVNULL,
        )
        try:
            eventually(lambda: running.state("worker-0") == "draining")
            chunks = load.chunks
            eventually(lambda: load.chunks > chunks + 50)
            running.worker("worker-1")
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
        load.finish()
        running.at_rest()
        running.answered(load)


def test_a_worker_joins_and_decodes_within_five_seconds_of_being_ready() -> None:
    with serving(workers=1) as (running, load):
        took: list[float] = []  # seconds; the least counts, since a machine may stand still as long
        while len(took) < 3 and (not took or took[-1] >= 6):
            name = f"worker-{1 + len(took)}"
            running.worker(name)
            eventually(lambda name=name: running.state(name) == "ready")
            ready = time.monotonic()
            eventually(lambda name=name: running.figure(name, "worker_tokens") > 0)
            took.append(time.monotonic() - ready)
        assert min(took) < 5 + 1  # its figures come once a second
        load.finish()
        running.at_rest()
        running.answered(load)


def test_a_drain_that_takes_too_long_ends_the_worker_and_loses_nothing() -> None:
    with serving(workers=1) as (running, load):
        drained = command(running.stack, "drain", "worker-0", "--timeout", "0.5")
        assert drained.returncode == 1
        assert "still had work" in drained.stdout
        assert "only worker" in drained.stdout
        running.worker("worker-1")
        load.finish()
        running.at_rest()
        running.answered(load)


def test_a_frontend_is_drained_and_its_streams_end_in_peace() -> None:
    with serving(workers=1, frontends=2, streams=16) as (running, load):
        others = Load({"frontend-1": running.urls["frontend-1"]}, 16, first=1000)
        load.no_more()  # at the one that leaves
        drained = command(running.stack, "drain", "frontend-0")
        assert drained.returncode == 0, drained.stderr
        assert running.services["frontend-0"].popen.wait(60) == 0
        load.finish()
        others.finish()
        running.at_rest()


def test_what_cannot_be_drained_is_said_in_one_line() -> None:
    with serving(workers=1, streams=1) as (running, load):
        for arguments, why in (
            (("drain", "nobody"), "no service"),
            (("drain", "scheduler-0"), "nothing to hand over"),
            (("roll",), "by hand"),
        ):
            ended = command(running.stack, *arguments)
            assert ended.returncode == 2
            assert why in ended.stderr
            assert ended.stderr.count("\n") == 1
        load.finish()


def test_every_service_is_rolled_under_streams() -> None:
    with stack() as made:
        made.up("--runner", "oracle", "--frontends", "2", "--workers", "2", env={"PAGEWIRE_ORACLE_STEP_TIME": "0.04"})

        def services() -> dict[str, int]:
            return {s.name: s.pid for s in RunDir(made.run_dir).services() if s.state in ("ready", "running")}

        before = eventually(lambda: found if len(found := services()) == 6 else None)
        load = Load({"shared": made.url})
        load.well_underway()
        rolled = command(made, "roll", timeout=180)
        assert rolled.returncode == 0, rolled.stderr + rolled.stdout
        after = eventually(lambda: found if len(found := services()) == len(before) else None)
        assert not set(after.values()) & set(before.values()), "a service has not been replaced"
        chunks = load.chunks
        eventually(lambda: load.chunks > chunks + 100)
        load.finish()
        eventually(lambda: made.metrics().get('pagewire_blocks{name="scheduler-0",state="used"}') == 0)
        failed = {name: n for name, n in made.metrics().items() if 'status="failed"' in name}
        assert not any(failed.values()), failed
