"""Starting programs in tests, waiting for what they do, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")
PATIENCE = 100.0  # seconds to wait for what must come; only what never comes takes them


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

    def read_until(self, text: str, timeout: float = PATIENCE, lines: int = 1) -> str:
        """The output up to and with the line that holds `text`, or so many of them."""
        deadline = time.monotonic() + timeout
        while sum(text in line for line in self.output.splitlines(keepends=True) if line.endswith("\n")) < lines:
            assert self._read(deadline), f"{text!r} did not come; output:\n{self.output}"
        return self.output

    def read_some(self, timeout: float) -> None:
        """Read whatever comes within that time."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass

    def wait(self, timeout: float = PATIENCE) -> int:
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

    def orphans(self) -> list[psutil.Process]:
        """Whom it left behind when it was killed; none once it has been waited for, since its pid may be another's then."""
        return [process for process in psutil.process_iter() if self.process.returncode is None and _session(process) == self.pid]


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return 0


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str] | None = None) -> Iterator[Program]:
    """Run a program for the time of a block; whatever is left of it and its descendants is killed afterwards."""
    program = Program(command, env)
    seen: set[psutil.Process] = set()
    try:
        yield program
    finally:
        while fresh := {*program.family(), *program.orphans()} - seen:  # who stands still starts nobody behind this look
            seen |= fresh
            for process in fresh:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
        for process in seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(seen, timeout=PATIENCE)  # a dying one may still write where the test cleans up
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.process.wait()
        assert program.process.stdout is not None
        program.process.stdout.close()


def eventually(what: Callable[[], T], timeout: float = PATIENCE) -> T:
    """What the call returns once that is true."""
    deadline = time.monotonic() + timeout
    while not (result := what()):
        assert time.monotonic() < deadline, f"{what} did not become true within {timeout} s"
        time.sleep(0.02)
    return result


def gone(processes: Sequence[psutil.Process]) -> bool:
    """Whether all have ended, be it that nobody has asked for their exit codes yet."""
    return not any(_runs(process) for process in processes)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # between the two questions
        return False


def free_port() -> int:
    """A port of loopback that nobody has, nor is given by the system: those that it gives begin above."""
    above = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(above, 20_000))
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def left_in(run_dir: Path) -> list[str]:
    """Sockets, locks and service files in a run directory."""
    return [str(path) for pattern in ("*.sock", "*.lock", "services/*") for path in run_dir.glob(pattern)]
