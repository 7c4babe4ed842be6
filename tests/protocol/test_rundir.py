"""The run directory: endpoints, service files, keys and epochs."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protocol.files import RunDirError
from protocol.locks import Busy, Guard, ipc_path
from protocol.registration import Registration, new_incarnation, process_start
from protocol.rundir import RunDir, default_run_dir


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        yield Path(folder)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_run_directory_is_private_and_holds_its_sockets(short: Path) -> None:
    rundir = RunDir(short / "a" / "b")
    assert mode(short / "a" / "b") == mode(short / "a") == 0o700
    assert rundir.frontends == f"ipc://{short}/a/b/frontends.sock"
    assert rundir.workers == f"ipc://{short}/a/b/workers.sock"
    assert rundir.telemetry == f"ipc://{short}/a/b/telemetry.sock"
    assert rundir.tap("worker-0") == f"ipc://{short}/a/b/tap-worker-0.sock"


def test_a_long_path_gets_its_sockets_in_a_short_private_folder_that_every_process_agrees_on(short: Path) -> None:
    long = short / ("x" * 80)
    rundir = RunDir(long)
    assert rundir.sockets == RunDir(long).sockets != RunDir(short / ("y" * 80)).sockets
    assert mode(rundir.sockets) == 0o700
    longest = ipc_path(rundir.tap("n" * 24))
    assert longest is not None
    assert len(os.fsencode(longest)) < 100
    rundir.tidy()
    RunDir(short / ("y" * 80)).tidy()
    assert not rundir.sockets.exists()


def test_a_directory_open_to_others_gets_its_sockets_elsewhere(short: Path) -> None:
    (short / "open").mkdir()
    os.chmod(short / "open", 0o755)
    rundir = RunDir(short / "open")
    assert rundir.sockets != rundir.path
    assert mode(rundir.sockets) == 0o700
    rundir.tidy()
    assert not rundir.sockets.exists()


def test_cleaning_keeps_the_folder_in_which_sockets_are_about_to_be_made(short: Path) -> None:
    rundir = RunDir(short / ("x" * 80))
    (rundir.sockets / "workers.sock").touch()
    rundir.clean()
    assert list(rundir.sockets.glob("*.sock")) == []
    (rundir.sockets / "up.sock").touch()
    rundir.tidy()
    assert rundir.sockets.exists()  # somebody's socket is in it
    (rundir.sockets / "up.sock").unlink()
    for lock in rundir.sockets.glob("*.lock"):
        lock.unlink()
    rundir.tidy()
    assert not rundir.sockets.exists()


def test_the_default_is_one_directory_per_working_directory(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    monkeypatch.chdir(short)
    first = default_run_dir()
    assert first.parent == short / "pagewire"
    (short / "other").mkdir()
    monkeypatch.chdir(short / "other")
    assert default_run_dir() != first


def test_without_a_private_runtime_directory_the_default_lies_in_the_temporary_directory(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short / "missing"))
    base = default_run_dir().parent
    assert base == short / f"pagewire-{os.getuid()}"
    os.chmod(base, 0o777)
    with pytest.raises(RunDirError, match="open to others"):
        default_run_dir()


def test_services_are_listed_with_their_state_and_removed_when_they_end(short: Path) -> None:
    rundir = RunDir(short)
    registration = rundir.register("worker", "worker-0", 7)
    [record] = rundir.services()
    assert (record.role, record.name, record.pid, record.incarnation, record.state) == ("worker", "worker-0", os.getpid(), 7, "starting")
    registration.state("loading")
    assert rundir.services()[0].state == "loading"
    with pytest.raises(Busy, match="the service name worker-0 is in use by process"):
        rundir.register("worker", "worker-0", 8)
    registration.remove()
    assert rundir.services() == []
    assert list((short / "services").iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "x" * 25, "a b", "é"])
def test_a_service_name_is_a_plain_file_name(short: Path, name: str) -> None:
    with pytest.raises(RunDirError, match="is no service name"):
        RunDir(short).register("worker", name, 1)


def test_a_recycled_pid_is_not_taken_for_the_service(short: Path) -> None:
    rundir = RunDir(short)
    registration = rundir.register("worker", "worker-0", 7)
    path = short / "services" / "worker-0.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "started": content["started"] - 1}))
    assert rundir.services() == []
    assert rundir.last_record("worker-0") is not None
    registration.remove()


def test_cleaning_removes_what_the_dead_left_and_nothing_of_the_living(short: Path) -> None:
    rundir = RunDir(short)
    registration = rundir.register("scheduler", "scheduler-0", 7)
    guard = Guard(rundir.workers)
    (short / "workers.sock").write_text("live")
    dead = {"role": "worker", "name": "worker-0", "pid": 2**22 + 1, "incarnation": 1, "state": "ready", "started": 1}
    (short / "services" / "worker-0.json").write_text(json.dumps(dead))
    (short / "services" / "worker-1.json").write_text("{torn")
    (short / "services" / "worker-0.lock").touch()
    (short / "tap-worker-0.sock").touch()
    (short / "tap-worker-0.sock.lock").touch()
    rundir.clean()
    assert {p.name for p in (short / "services").iterdir()} == {"scheduler-0.json", "scheduler-0.lock"}
    assert {p.name for p in short.glob("*.sock*")} == {"workers.sock", "workers.sock.lock"}
    guard.release()
    registration.remove()


def test_the_hash_key_is_made_once_and_kept_private(short: Path) -> None:
    rundir = RunDir(short)
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: rundir.hash_key(), range(16)))
    assert len(keys) == 1
    assert len(keys.pop()) == 16
    assert mode(short / "hash.key") == 0o600
    assert [p.name for p in short.iterdir() if p.is_file()] == ["hash.key"]
    (short / "hash.key").write_bytes(b"short")
    with pytest.raises(RunDirError, match="must hold 16 bytes"):
        rundir.hash_key()


def test_no_epoch_is_claimed_twice(short: Path) -> None:
    rundir = RunDir(short)
    assert rundir.epoch() == 0
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: rundir.claim_epoch(), range(32)))
    assert sorted(claimed) == list(range(1, 33))
    assert rundir.claim_epoch(100) == rundir.epoch() == 101
    (short / "epoch").write_text("many")
    with pytest.raises(RunDirError, match="does not hold a number"):
        rundir.epoch()


def test_who_serves_goes_on_though_its_state_cannot_be_written(
    short: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registration = Registration(short, "worker", "worker-0", 7)

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("protocol.registration.write", full)
        registration.state("ready")
    assert "No space left on device" in caplog.text
    registration.serves("http://127.0.0.1:1")
    assert json.loads((short / "worker-0.json").read_text())["state"] == "ready"
    registration.remove()


def test_a_zombie_counts_as_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(child.pid) == 0
    child.wait()
    assert process_start(os.getpid()) > 0


def test_a_process_s_name_may_be_no_text() -> None:
    """As a long one is that the system has cut in the middle of a character; its pid may be a dead service's."""
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'ab\\xc3'); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert process_start(child.pid) > 0
    child.communicate(b"\n")


def test_incarnations_stay_exact_in_json_readers_that_use_doubles() -> None:
    numbers = {new_incarnation() for _ in range(1000)}
    assert len(numbers) == 1000
    assert all(0 < n < 2**53 for n in numbers)
