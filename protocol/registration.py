"""How a service says that it runs here: a file in the run directory's `services/`, and a name that it alone holds."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from protocol.files import RunDirError, write
from protocol.locks import PATIENCE, Lock

log = logging.getLogger("service")

LONGEST_NAME = 24  # of a service; its tap's socket has the longest path of all


def process_start(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold anything
    return 0 if fields[0] in "ZX" else int(fields[19])


def new_incarnation() -> int:
    """A random number that names this start of this process. 52 bits, so that JSON readers keep it exact."""
    return int.from_bytes(os.urandom(8), "big") >> 12 | 1


@dataclass(frozen=True)
class ServiceRecord:
    """A service as its file in the run directory tells it."""

    role: str  # frontend, scheduler, worker, admin
    name: str
    pid: int
    incarnation: int
    state: str  # starting, loading, waiting, ready, stopping
    started: int  # clock ticks since boot, which tells a recycled pid apart
    url: str = ""  # where it serves HTTP, as a client on this host names it; empty: it does not, or not yet

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return process_start(self.pid) == self.started


class Registration:
    """This process's file in `services/`; the name is held by a lock as long as the process lives."""

    def __init__(self, folder: Path, role: str, name: str, incarnation: int) -> None:
        check_name(name)
        self._lock = Lock(folder / f"{name}.lock", f"the service name {name}", PATIENCE)
        self._path = folder / f"{name}.json"
        pid = os.getpid()
        self.record = ServiceRecord(role, name, pid, incarnation, "starting", process_start(pid))
        self._store()

    def state(self, state: str) -> None:
        """Tell what the service is doing: loading, waiting, ready, stopping."""
        if state != self.record.state:
            self._tell(replace(self.record, state=state))

    def serves(self, url: str) -> None:
        """Tell where the service answers HTTP."""
        self._tell(replace(self.record, url=url))

    def remove(self) -> None:
        """The service is gone. Harmless when repeated."""
        self._path.unlink(missing_ok=True)
        self._lock.release()

    def _tell(self, record: ServiceRecord) -> None:
        """Who serves goes on without being seen, be the disk full."""
        self.record = record
        try:
            self._store()
        except OSError as error:
            log.warning("%s cannot be written, others see an old state: %s", self._path, error.strerror)

    def _store(self) -> None:
        write(self._path, json.dumps(asdict(self.record)).encode())


def check_name(name: str) -> None:
    """Raise RunDirError if a service cannot be called so."""
    if not 0 < len(name) <= LONGEST_NAME or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name) or name[0] == ".":
        raise RunDirError(f"{name!r} is no service name: 1 to {LONGEST_NAME} letters, digits, '-', '_' and '.'")
