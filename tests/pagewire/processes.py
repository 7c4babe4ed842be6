"""Starting programs in tests, waiting for what they do, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")


class Program:
    """A running program whose output is read line by line."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PAGEWIRE_")}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**clean, **(env or {})}, start_new_session=True
        )
        self.output = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def read_until(self, text: str, timeout: float = 60.0) -> str:
        """The output up to and with the line that holds `text`."""
        deadline = time.monotonic() + timeout
        while not any(text in line for line in self.output.splitlines(keepends=True) if line.endswith("\n")):
            assert self._read(deadline), f"{text!r} did not come; output:\n{self.output}"
        return self.output

    def read_some(self, timeout: float) -> None:
        """Read whatever comes within that time."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass

    def wait(self, timeout: float = 30.0) -> int:
        """The exit code; the output is read to its end."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
        self.output += data.decode(errors="replace")
        return bool(data)

    def family(self) -> list[psutil.Process]:
        """The program and all that descends from it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.pid)
            return [top, *top.children(recursive=True)]
        return []


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str] | None = None) -> Iterator[Program]:
    """Run a program for the time of a block; whatever is left of it and its descendants is killed afterwards."""
    program = Program(command, env)
    seen: dict[int, psutil.Process] = {}
    try:
        yield program
    finally:
        for process in program.family():
            seen[process.pid] = process
        for process in seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(seen.values(), timeout=5)  # a dying one may still write where the test cleans up
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.process.wait()
        assert program.process.stdout is not None
        program.process.stdout.close()


def eventually(what: Callable[[], T], timeout: float = 60.0) -> T:
    """What the call returns once that is true."""
    deadline = time.monotonic() + timeout
    while not (result := what()):
        assert time.monotonic() < deadline, f"{what} did not become true within {timeout} s"
        time.sleep(0.02)
    return result


def left_in(run_dir: Path) -> list[str]:
    """Sockets, locks and service files in a run directory."""
    return [str(path) for pattern in ("*.sock", "*.lock", "services/*") for path in run_dir.glob(pattern)]
