"""A service's life: signals, logs, its parent, and its end, whatever hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.rundir import RunDir

pytestmark = pytest.mark.slow

OPENING = """
import ctypes, os, signal, sys, threading, time, zmq
from pathlib import Path
from protocol.service import CannotRun, Service, die_with_parent
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
with Service("worker", "worker-0", Path(sys.argv[1]), stop_limit=float(sys.argv[2])) as service:
    service.state("ready")
    print("ready", flush=True)
"""
POLLS = """
    poller = zmq.Poller()
    poller.register(service.stop_fd, zmq.POLLIN)
    while not service.stopping.is_set():
        poller.poll()
"""
LOOPS = """
    import uvloop, asyncio
    async def serve():
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_reader(service.stop_fd, stopped.set)
        await stopped.wait()
    uvloop.run(serve())
"""
DEEP = """
    import uvloop
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    def free():
        print("noticed" if service.stopping.wait(60) else "nothing noticed", flush=True)
        libc.pthread_mutex_unlock(mutex)
    async def serve():
        service.hear_signals()
        threading.Thread(target=free).start()
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)  # waits, whatever signal comes
    print("deep", flush=True)
    uvloop.run(serve())
"""
HANGS = """
    signals = {2, 15}
    while True:
        try: ctypes.CDLL(None).pause()
        except BaseException: pass
"""

WORKS = """
    service.stopping.wait()
    print("stopping", flush=True)
    for _ in range(20): time.sleep(0.1)
"""


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        yield Path(folder)


@contextlib.contextmanager
def service(
    run_dir: Path, body: str, limit: float = 30.0, env: dict[str, str] | None = None, opening: str = OPENING
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", opening + body, str(run_dir), str(limit)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("body", [POLLS, LOOPS], ids=["poller", "event loop"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_service_in_order(run_dir: Path, body: str, number: signal.Signals) -> None:
    with service(run_dir, body) as process:
        process.send_signal(number)
        assert process.wait(60) == 0
    assert RunDir(run_dir).last_record("worker-0") is None
    assert not (run_dir / "services" / "worker-0.lock").exists()


def test_a_signal_is_noticed_while_an_event_loop_is_deep_in_a_library(run_dir: Path) -> None:
    with service(run_dir, DEEP) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "deep\n"
        time.sleep(0.5)  # until it is in there; earlier, the signal would be noticed all the same
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "noticed\n"
        assert process.wait(60) == 0


def test_a_service_whose_main_thread_hangs_is_killed_by_its_own_timer_and_leaves_its_stacks(run_dir: Path) -> None:
    with service(run_dir, HANGS, limit=0.5) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGKILL
    log = (run_dir / "logs" / "worker-0.log").read_text()
    assert "did not stop within 0.5 s" in log
    assert "most recent call first" in log


def test_a_time_in_which_the_process_stood_still_does_not_shorten_its_end(run_dir: Path) -> None:
    with service(run_dir, WORKS, limit=3.0) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0


def test_sigusr1_writes_all_stacks_to_the_log_and_the_service_goes_on(run_dir: Path) -> None:
    with service(run_dir, POLLS) as process:
        process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 60
        while "most recent call first" not in (run_dir / "logs" / "worker-0.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert process.poll() is None


def test_a_crash_is_logged_with_its_stack_and_the_flight_recorder_and_ends_with_code_one(run_dir: Path) -> None:
    with service(run_dir, '    service.flight.record("in", "x", [b""])\n    raise ValueError("wrong turn")\n') as process:
        assert process.wait(60) == 1
    log = (run_dir / "logs" / "worker-0.log").read_text()
    assert 'raise ValueError("wrong turn")' in log or "ValueError: wrong turn" in log
    [dump] = (run_dir / "flight").iterdir()
    assert "ValueError: wrong turn" in dump.read_text()
    record = RunDir(run_dir).last_record("worker-0")
    assert record is not None
    assert record.state == "ready"  # the supervisor reads how far it got
    assert not record.alive


def test_a_service_ends_with_the_parent_that_asked_for_it(run_dir: Path) -> None:
    starter = (
        "import os, subprocess, sys, time\n"
        "env = {**os.environ, 'PAGEWIRE_PARENT': str(os.getpid())}\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], *sys.argv[2:]], env=env)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", starter, OPENING + POLLS, str(run_dir), "30"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    [record] = RunDir(run_dir).services()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while record.alive:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.stdout.close()
    assert RunDir(run_dir).last_record("worker-0") is None  # it ended in order


def test_a_service_whose_parent_has_died_already_does_not_start(run_dir: Path) -> None:
    command = [sys.executable, "-c", OPENING, str(run_dir), "30"]
    ended = subprocess.run(command, env={**os.environ, "PAGEWIRE_PARENT": "1"}, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stdout == b""


def test_missing_peers_are_mentioned_once(run_dir: Path) -> None:
    body = "    for _ in range(5): service.waiting('a scheduler')\n    service.present('a scheduler')\n    service.present('a scheduler')\n"
    with service(run_dir, body + "    service.waiting('a scheduler')\n") as process:
        process.wait(60)
    log = (run_dir / "logs" / "worker-0.log").read_text()
    assert log.count("waiting for a scheduler") == 2
    assert log.count("found a scheduler") == 1


def test_what_a_log_call_adds_stands_behind_its_message(run_dir: Path) -> None:
    with service(run_dir, '    service.log.warning("opened %d", 3, extra={"epoch": 4, "peer": "worker-1"})\n') as process:
        process.wait(60)
    assert "WARNING worker-0 worker: opened 3 epoch=4 peer=worker-1\n" in (run_dir / "logs" / "worker-0.log").read_text()


def test_a_line_in_json_is_one_object_with_the_call_s_fields_and_the_stack(run_dir: Path) -> None:
    body = """    service.log.info("request ended", extra={"request": "ab12", "tokens": 3})
    try:
        raise ValueError("of two\\nlines")
    except ValueError:
        service.log.exception("failed: %s", "this")
"""
    with service(run_dir, body, opening=OPENING.replace("stop_limit=", 'log_format="json", stop_limit=')) as process:
        process.wait(60)
    lines = [json.loads(line) for line in (run_dir / "logs" / "worker-0.log").read_text().splitlines()]
    [ended] = [line for line in lines if line["message"] == "request ended"]
    assert ended.pop("time").endswith("Z")
    assert ended == {
        "level": "INFO",
        "service": "worker-0",
        "logger": "worker",
        "message": "request ended",
        "request": "ab12",
        "tokens": 3,
    }
    [failed] = [line for line in lines if line["message"] == "failed: this"]
    assert failed["exception"].endswith("ValueError: of two\nlines")


def test_logs_are_rotated_and_stacks_follow(run_dir: Path) -> None:
    body = """
    import logging, protocol.service
    handler = logging.getLogger().handlers[0]
    assert handler.maxBytes == 50_000_000
    handler.maxBytes = 2000
    for i in range(100): service.log.info("line %d of many that fill a file", i)
    os.kill(os.getpid(), 10)
"""
    with service(run_dir, body) as process:
        assert process.wait(60) == 0
    assert "most recent call first" in (run_dir / "logs" / "worker-0.log").read_text()
    assert {p.name for p in (run_dir / "logs").iterdir()} == {"worker-0.log", *(f"worker-0.log.{i}" for i in (1, 2, 3))}


def test_a_second_service_of_one_name_is_refused_with_the_pid_of_the_first(run_dir: Path) -> None:
    with service(run_dir, POLLS) as process:
        second = subprocess.run(
            [sys.executable, "-c", OPENING, str(run_dir), "30"], capture_output=True, text=True, timeout=60, check=False
        )
        assert f"the service name worker-0 is in use by process {process.pid}" in second.stderr
        assert second.returncode != 0
