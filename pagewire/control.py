"""How `pagewire drain`, `start` and `roll` talk to the supervisor of a run directory: a line of JSON each way, on a Unix socket.

{"do": "twin", "name": NAME}      start another service like this one  → {"name": its name}
{"do": "retire", "name": NAME}    let it drain, and do not start it again
{"do": "start", "name": NAME}     start one again that was drained
{"do": "restart", "name": NAME}   let it stop, and start it again at once
{"do": "look", "name": NAME}      nothing; an error if it has been given up
{"do": "has", "name": NAME}       whether it is the supervisor's at all     → {"has": "yes" or ""}
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path

from protocol.files import RunDirError
from protocol.rundir import RunDir

PATIENCE = 2.0  # seconds that either side waits for a line
LONGEST = 4096  # bytes of a line


def control_path(rundir: RunDir) -> Path:
    """Where the supervisor listens."""
    return rundir.sockets / "up.sock"


class Control:
    """The supervisor's end: readable when somebody asks. `handle(command, name)` answers, or raises ValueError."""

    def __init__(self, rundir: RunDir, handle: Callable[[str, str], dict[str, str]]) -> None:
        self._handle = handle
        self._path = control_path(rundir)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self._path.unlink(missing_ok=True)  # the run directory's lock is ours, so whoever made it is dead
        self.socket.bind(str(self._path))
        self.socket.listen(8)

    def answer(self) -> None:
        """Answer everybody who asks now. One who says nothing is not waited for."""
        with contextlib.suppress(BlockingIOError):
            while True:
                asking, _ = self.socket.accept()
                with asking, contextlib.suppress(OSError):
                    asking.settimeout(PATIENCE)
                    asking.sendall(json.dumps(self._reply(_line(asking))).encode() + b"\n")

    def close(self) -> None:
        """Close the socket and remove its file."""
        self.socket.close()
        self._path.unlink(missing_ok=True)

    def _reply(self, line: bytes) -> dict[str, str]:
        try:
            asked = json.loads(line)
            return self._handle(str(asked["do"]), str(asked["name"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return {"error": str(error)}


def ask(rundir: RunDir, command: str, name: str) -> dict[str, str] | None:
    """Ask the supervisor; None if the run directory has none. Raises RunDirError with its objection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(5 * PATIENCE)
        try:
            asking.connect(str(control_path(rundir)))
            asking.sendall(json.dumps({"do": command, "name": name}).encode() + b"\n")
            reply: dict[str, str] = json.loads(_line(asking))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except (OSError, ValueError) as error:
            raise RunDirError(f"the supervisor does not answer: {error}") from None
    if "error" in reply:
        raise RunDirError(reply["error"])
    return reply


def _line(source: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < LONGEST and (more := source.recv(LONGEST)):
        data += more
    return data
