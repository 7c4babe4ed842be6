"""Workers stop, freeze, hang, or fail at one request; only that request may feel it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.e2e.stack import eventually
from tests.faults.fleet import Fleet, fleet, serving
from tests.faults.load import Load, Seen

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

POISON = "\x07"  # a byte that no other prompt and no oracle stream holds

FREEZE = """
import ctypes, os, threading, time

def freeze():
    while not os.path.exists({file!r}):
        time.sleep(0.02)
    os.rename({file!r}, {file!r} + ".taken")
    ctypes.PyDLL(None).sleep(10)  # holds the interpreter's lock: ZeroMQ's threads live, no Python runs
    open({file!r} + ".over", "w").close()

threading.Thread(target=freeze, daemon=True).start()
"""


def poisoned(running: Fleet) -> Seen:
    """A request that does to its worker what the marks say, read to its end."""
    body: dict[str, Any] = {"prompt": f"harm{POISON}less", "max_tokens": 20, "seed": 1}
    seen = Seen(body, "frontend-0")
    seen.read(running.urls["frontend-0"])
    return seen


def only_it_failed(running: Fleet, load: Load, code: str, last: Seen) -> None:
    assert last.error is not None, last
    assert last.error["code"] == code
    load.finish()
    running.at_rest(failed=1)


def test_a_worker_is_stopped_for_five_seconds_and_its_late_results_are_dropped() -> None:
    with serving() as (running, load):
        with running.stopped("worker-0") as began:
            eventually(lambda: running.sum("workers_ready", "scheduler") == 1)
            time.sleep(max(0.0, began + 5 - time.monotonic()))
        eventually(lambda: running.sum("workers_ready", "scheduler") == 2)
        eventually(lambda: running.total("wire_session_closed") >= 2)  # on both sides; each tells it in its own time
        load.finish()
        running.at_rest()
        running.answered(load)


def test_no_python_of_a_worker_runs_for_ten_seconds_while_its_io_threads_live(tmp_path) -> None:
    trigger = tmp_path / "freeze"
    with fleet() as running:
        running.scheduler()
        running.worker("worker-0")
        running.patched_worker("worker-1", FREEZE.format(file=str(trigger)))
        running.frontend()
        running.ready(2)
        load = Load(running.urls)
        load.well_underway()
        trigger.touch()
        eventually(lambda: (tmp_path / "freeze.taken").exists())
        eventually(lambda: running.sum("workers_ready", "scheduler") == 1)
        assert not (tmp_path / "freeze.over").exists(), "it was lost only after it had come back"
        eventually(lambda: (tmp_path / "freeze.over").exists() and running.sum("workers_ready", "scheduler") == 2)
        assert running.services["worker-1"].popen.poll() is None
        load.finish()
        running.at_rest()
        running.answered(load)


def test_a_step_raises_for_one_request_and_only_that_one_fails() -> None:
    with serving(env={"PAGEWIRE_ORACLE_MARKS": f"{ord(POISON)}=raise"}) as (running, load):
        last = poisoned(running)
        eventually(lambda: "marked to raise" in "".join(running.services[f"worker-{i}"].output() for i in range(2)))
        only_it_failed(running, load, "step_failed", last)


def test_a_request_that_computes_nan_fails_alone() -> None:
    with serving(env={"PAGEWIRE_ORACLE_MARKS": f"{ord(POISON)}=nan"}) as (running, load):
        last = poisoned(running)
        running.fresh()
        assert running.total("wire_scheduler_nan_rows") > 0
        only_it_failed(running, load, "nan", last)


def test_a_request_kills_its_worker_each_time_and_only_that_one_fails() -> None:
    marks = {"PAGEWIRE_ORACLE_MARKS": f"{ord(POISON)}=crash"}
    with serving(env=marks) as (running, load), running.kept("worker-0", "worker-1") as codes:
        last = poisoned(running)
        eventually(lambda: len(codes) >= 4)
        assert set(codes) == {-9}
        eventually(lambda: running.sum("workers_ready", "scheduler") == 2)
        only_it_failed(running, load, "step_failed", last)


def test_a_request_hangs_its_worker_each_time_and_only_that_one_fails() -> None:
    marks = {"PAGEWIRE_ORACLE_MARKS": f"{ord(POISON)}=hang"}
    with serving(workers=3, env=marks, factor=0.35) as (running, load), running.kept("worker-0", "worker-1", "worker-2") as codes:
        last = poisoned(running)
        eventually(lambda: len(codes) >= 4)
        assert set(codes) == {1}, "a hung worker ends itself, so that it can be replaced"
        eventually(lambda: running.sum("workers_ready", "scheduler") == 3)
        only_it_failed(running, load, "step_failed", last)
