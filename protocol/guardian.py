"""Kills what a killed program leaves of the services that it started, and removes their folder if it is a passing one.

Services end themselves when who started them dies (`service.py`), unless they are stopped or hang inside a library
with the interpreter locked. This process waits for the starter's end, gives them that chance, and kills the rest. It
reads lines `+PID` and `-PID` from its standard input, which the starter alone holds open.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from protocol.rundir import process_start

PATIENCE = 4.5  # seconds that services get to end themselves


class Guardian:
    """The starter's side: starts the process and tells it whom to watch, and which folder goes with them, if any."""

    def __init__(self, folder: Path | None = None) -> None:
        command = [sys.executable, "-P", "-m", "protocol.guardian", *([str(folder)] if folder else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0)

    def watch(self, pid: int) -> None:
        """Watch over the process group of `pid`."""
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        """That one is gone."""
        self._tell(f"-{pid}\n")

    def close(self) -> None:
        """Nothing is left to watch: end the process, which removes the folder."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def main() -> None:
    """Watch until the starter ends, then wait for the watched ones, then kill them; remove the folder, if one is named."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watched: dict[int, int] = {}
    for line in sys.stdin:
        pid = int(line[1:])
        if line[0] == "+":
            watched[pid] = process_start(pid)
        else:
            watched.pop(pid, None)
    deadline = time.monotonic() + PATIENCE
    while watched:
        late = time.monotonic() >= deadline
        for pid, started in list(watched.items()):
            if late or process_start(pid) != started:  # its helpers, if any, end with it
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                del watched[pid]
        time.sleep(0.05)
    for folder in sys.argv[1:]:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
