"""The guardian of what a program has started: it ends when it is told to, and when the program has ended, whoever holds its pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from protocol import guardian
from tests.e2e.stack import eventually

pytestmark = pytest.mark.slow
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from protocol.guardian import Guardian

folder, killed = Path(sys.argv[1]), sys.argv[2] == "killed"
service = subprocess.Popen(["sleep", "600"], process_group=0)
guardian = Guardian(folder, passing=True)
guardian.watch(service.pid)
child = os.fork()  # as multiprocessing does: it holds the guardian's pipe, too
if not child:
    time.sleep(600)
print(child, service.pid, flush=True)
if killed:
    os.kill(os.getpid(), signal.SIGKILL)
service.kill()
service.wait()
guardian.forget(service.pid)
guardian.close()
guardian.close()
print("closed", flush=True)
"""


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_forked_child_keeps_nothing_from_its_end(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "passing"
    folder.mkdir()
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), how], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    pids = [int(word) for word in program.stdout.readline().split()]
    try:
        program.wait(60)
        eventually(lambda: not folder.exists())
        assert (program.returncode == -signal.SIGKILL) == (how == "killed")
        eventually(lambda: not _runs(pids[1]))
        assert _runs(pids[0])  # it held the pipe to the last
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        program.kill()
        program.wait()
        program.stdout.close()


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.mark.parametrize(("starts", "killed"), [([5, 0], [123]), ([0, 0], [123]), ([5, 7], []), ([0, 7], [])])
def test_helpers_of_what_has_ended_are_killed_and_no_stranger_who_has_its_number(
    starts: list[int], killed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    seen = iter(starts)
    monkeypatch.setattr(guardian, "process_start", lambda pid: next(seen))
    monkeypatch.setattr(guardian, "_lines", lambda starter: iter(["+123"]))
    monkeypatch.setattr(guardian.signal, "signal", lambda number, action: None)
    monkeypatch.setattr(guardian.os, "killpg", lambda group, number: told.append(group))
    monkeypatch.setattr(sys, "argv", ["guardian", "1", str(tmp_path)])
    guardian.main()
    assert told == killed
