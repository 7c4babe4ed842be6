"""A program in a terminal of its own, as a user has it: keys go in, the screen comes out."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

from tests.pagewire.processes import PATIENCE

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07|\x1b[=>]")


class Terminal:
    """One running program."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self._fd = fd
        self._raw = b""
        self._seen = 0

    def type(self, keys: str) -> None:
        """Press keys; \\x03 is Ctrl-C."""
        os.write(self._fd, keys.encode())

    def read(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Wait for output that matches, behind what was matched before."""
        deadline = time.monotonic() + timeout
        while True:
            text = ESCAPES.sub("", self._raw.decode(errors="replace"))
            if match := re.compile(pattern, re.S).search(text, self._seen):
                self._seen = match.end()
                return match
            assert time.monotonic() < deadline, f"{pattern!r} did not come:\n{text[self._seen :]}"
            if select.select([self._fd], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the program has ended
                    self._raw += os.read(self._fd, 65536)

    def wait(self) -> int:
        """The exit status; what is still printed is thrown away."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            if select.select([self._fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    self._raw += os.read(self._fd, 65536)
        return self.process.returncode


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    """`pagewire ARGUMENTS` in a terminal of 100 columns and 30 lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    env = {key: value for key, value in os.environ.items() if not key.startswith("PAGEWIRE_")} | {"TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        env.pop(name, None)
    # setsid makes the terminal the program's own, so that Ctrl-C reaches it
    command = ["setsid", "--ctty", sys.executable, "-P", "-m", "pagewire", *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)
        os.close(ours)
