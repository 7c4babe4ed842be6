"""Locks of files and endpoints: held by one process, free when it dies."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protocol.files import RunDirError
from protocol.locks import Busy, Guard, Lock
from protocol.rundir import RunDir


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        yield Path(folder)


def test_an_endpoint_is_guarded_and_the_holder_is_named(short: Path) -> None:
    endpoint = RunDir(short).workers
    with Guard(endpoint):
        with pytest.raises(Busy, match=f"{endpoint} is in use by process {os.getpid()}") as caught:
            Guard(endpoint)
        assert caught.value.pid == os.getpid()
    with Guard(endpoint):
        pass
    assert list(short.glob("*.sock*")) == []


def test_a_stale_socket_file_is_removed_before_binding_and_after(short: Path) -> None:
    (short / "workers.sock").write_text("left behind")
    guard = Guard(f"ipc://{short}/workers.sock")
    assert not (short / "workers.sock").exists()
    (short / "workers.sock").write_text("bound")
    guard.release()
    guard.release()
    assert list(short.iterdir()) == []


def test_a_tcp_endpoint_needs_no_guard_and_a_long_ipc_path_is_refused() -> None:
    Guard("tcp://127.0.0.1:1").release()
    with pytest.raises(RunDirError, match="shorter than 100 bytes"):
        Guard("ipc:///tmp/" + "x" * 100)


def test_a_lock_is_free_again_when_its_holder_is_killed(short: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from protocol.locks import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(short / "l")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Busy) as caught:
            Lock(short / "l")
        assert caught.value.pid == holder.pid
    finally:
        holder.kill()
        holder.communicate()
    Lock(short / "l").release()
    assert not (short / "l").exists()


def test_a_lock_taken_while_its_file_is_being_removed_is_taken_on_the_new_file(short: Path) -> None:
    def work(_: int) -> int:
        taken = 0
        for _ in range(200):
            try:
                with Lock(short / "l"):
                    inside.append(1)
                    assert len(inside) == 1
                    inside.pop()
                    taken += 1
            except Busy:
                pass
        return taken

    inside: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) > 0


def test_a_lock_held_for_a_moment_is_waited_for(short: Path) -> None:
    held = Lock(short / "l")
    with pytest.raises(Busy):
        Lock(short / "l")
    threading.Timer(0.1, held.release).start()
    Lock(short / "l", patience=60).release()
