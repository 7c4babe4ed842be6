"""Kills what a killed program leaves of the services that it started, and removes the files that nobody holds any more.

Services end themselves when who started them dies (`service.py`), unless they are stopped or hang inside a library
with the interpreter locked. This process waits for the starter's end, gives them that chance, and kills the rest. It
reads lines `+PID` and `-PID` from its standard input, and a last one, `.`: children that the starter has forked hold
the pipe open as well, so its end is not the starter's.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from protocol.files import RunDirError
from protocol.registration import process_start
from protocol.rundir import RunDir

PATIENCE = 4.5  # seconds that services get to end themselves
DYING = 60.0  # seconds that a killed one gets to be gone: until then its files count as somebody's
UNHEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # it ends when its work is done


class Guardian:
    """The starter's side: starts the process and tells it whom to watch, in which run directory.

    A `passing` run directory goes with them; of another one stale sockets and service files are removed.
    """

    def __init__(self, run_dir: Path, passing: bool = False) -> None:
        command = [sys.executable, "-P", "-m", "protocol.guardian", str(os.getpid()), str(run_dir), *(["passing"] if passing else [])]
        # Blocked in the process from its first moment: the kernel sends SIGHUP to one that is stopped when its starter dies.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, UNHEARD)
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def watch(self, pid: int) -> None:
        """Watch over the process group of `pid`."""
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        """That one is gone."""
        self._tell(f"-{pid}\n")

    def close(self) -> None:
        """Nothing is left to watch: end the process, which removes the files. Harmless when repeated."""
        assert self._process.stdin is not None
        self._tell(".\n")
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE + 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def _lines(starter: int) -> Iterator[str]:
    """What the starter says, until it has said all or has ended."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    with contextlib.suppress(ProcessLookupError):
        poll.register(os.pidfd_open(starter), select.POLLIN)
    said = b""
    while True:
        gone = os.getppid() != starter  # perhaps before this process could look
        if 0 not in (fd for fd, _ in poll.poll(0 if gone else None)):
            return  # it has ended, and everything that it said is read
        chunk = os.read(0, 4096)
        *lines, said = (said + chunk).split(b"\n")
        for line in lines:
            if line == b".":
                return
            yield line.decode()
        if not chunk:
            return


def main() -> None:
    """Watch until the starter ends, then wait for the watched ones, then kill them; remove what they left."""
    for number in UNHEARD:
        signal.signal(number, signal.SIG_IGN)
    watched: dict[int, int] = {}
    for line in _lines(int(sys.argv[1])):
        pid = int(line[1:])
        if line[0] == "+":
            watched[pid] = process_start(pid)
        else:
            watched.pop(pid, None)
    deadline = time.monotonic() + PATIENCE
    while watched:
        now = time.monotonic()
        for pid, started in list(watched.items()):
            lives = process_start(pid)
            ended = not started or lives != started
            strangers = lives not in (0, started)  # the number is in use again, so its group was empty
            if (ended or now >= deadline) and not strangers:  # its helpers, if any, end with it
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
            if ended or now >= deadline + DYING:
                del watched[pid]
        time.sleep(0.05)
    run_dir = Path(sys.argv[2])
    _clean(run_dir)
    if "passing" in sys.argv[3:]:
        shutil.rmtree(run_dir, ignore_errors=True)


def _clean(run_dir: Path) -> None:
    """Remove what the dead have left, unless the starter lives, or its successor: they see to that themselves."""
    with contextlib.suppress(RunDirError, OSError):
        rundir = RunDir(run_dir, make=False)
        with rundir.lock():
            rundir.clean()
            rundir.tidy()


if __name__ == "__main__":
    main()
