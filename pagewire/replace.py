"""`pagewire drain`, `start` and `roll`: services that leave on purpose and come back, one at a time, while the others serve."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from pagewire.control import ask
from protocol.files import RunDirError
from protocol.locks import Busy, Lock
from protocol.registration import ServiceRecord
from protocol.rundir import RunDir
from protocol.service import DRAIN_SIGNAL

LOOK = 0.05  # seconds between two looks at the run directory
SOON = 3.0  # seconds of waiting after which it is said what for
STOPS = 10.0  # seconds that a service gets to end once it has been told to stop
DRAINS = ("frontend", "worker")  # roles that hand over what they do
ORDER = ("worker", "frontend", "scheduler", "admin")  # in which `roll` goes


class NotDone(RunDirError):
    """What was asked did not come about, or somebody ended the wait for it."""


def _ends() -> set[signal.Signals]:
    """Signals that end a wait. SIGHUP is none under nohup."""
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    return ends if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else ends - {signal.SIGHUP}


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Let these signals come only while something is waited for: one between a question and its answer would lose the answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ends())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@_held_back()
def drain(rundir: RunDir, name: str, timeout: float, say: Callable[[str], None]) -> bool:
    """Let a service hand over what it does, and end; whether it did so in time. Raises RunDirError, NotDone.

    One that is leaving already is waited for. A service of `pagewire up` is not started again until `start` asks for it.
    After the timeout it is told to stop: what it still had goes on elsewhere as after a loss.
    """
    record = _find(rundir, name)
    if record.role not in DRAINS:
        raise RunDirError(f"{name} has nothing to hand over, only a worker or frontend has; `pagewire roll {name}` restarts it")
    if not any(other.role == record.role and other.name != name for other in rundir.services()):
        say(f"{name} is the only {record.role} of this run directory: unless another host has one, requests wait until one comes")
    try:
        asked = ask(rundir, "retire", name) is not None
    except RunDirError:
        if not _by_hand(rundir, name):
            raise
        asked = False
    if not asked:
        _signal(record, DRAIN_SIGNAL)
    if _until(lambda: not record.alive, timeout):
        say(f"{name} (pid {record.pid}) has left")
        return True
    _signal(record, signal.SIGTERM)
    say(f"{name} (pid {record.pid}) still had work after {timeout:g} s: stopped; its requests go on elsewhere")
    _until(lambda: not record.alive, STOPS)
    return False


@_held_back()
def start(rundir: RunDir, name: str, ready_timeout: float, say: Callable[[str], None]) -> None:
    """Have `pagewire up` start a service again that was drained, and wait until it is ready. Raises RunDirError, NotDone."""
    began = time.monotonic()
    old = rundir.last_record(name)
    _ask(rundir, "start", name)
    _await_ready(rundir, name, old.pid if old is not None else 0, ready_timeout, say)
    say(f"{name} (pid {_find(rundir, name).pid}) is ready after {time.monotonic() - began:.1f} s")


@_held_back()
def roll(rundir: RunDir, names: Sequence[str], drain_timeout: float, ready_timeout: float, say: Callable[[str], None]) -> None:
    """Replace services of `pagewire up` one at a time, all of them unless some are named. Raises RunDirError, NotDone.

    A worker or frontend is replaced by a new one, which must be ready before the old one is drained. A scheduler or
    admin server is restarted: what it holds comes back from the others. If a new one does not get ready, or a signal ends
    the wait for it, it leaves again.
    """
    try:
        with Lock(rundir.path / "roll.lock"):
            _roll(rundir, [_find(rundir, name) for name in dict.fromkeys(names)], drain_timeout, ready_timeout, say)
    except Busy as busy:
        raise NotDone(f"another roll is under way: process {busy.pid}") from None


def _roll(rundir: RunDir, named: list[ServiceRecord], drain_timeout: float, ready_timeout: float, say: Callable[[str], None]) -> None:
    records = named
    for record in [] if named else rundir.services():
        if _by_hand(rundir, record.name):
            say(f"{record.name} (pid {record.pid}) was not started by `pagewire up`: it stays as it is")
        else:
            records.append(record)
    for record in sorted(records, key=lambda record: (ORDER.index(record.role), record.name)):
        began = time.monotonic()
        if record.role not in DRAINS:
            _ask(rundir, "restart", record.name)
            fresh = record.name
            _await_ready(rundir, fresh, record.pid, ready_timeout, say)
        else:
            fresh = _ask(rundir, "twin", record.name)["name"]
            try:
                _await_ready(rundir, fresh, record.pid, ready_timeout, say)
            except BaseException:
                with contextlib.suppress(RunDirError):  # it may have been given up
                    _ask(rundir, "retire", fresh)
                    say(f"{fresh} is told to leave again; {record.name} stays")
                raise
            drain(rundir, record.name, drain_timeout, lambda _: None)
        new = _find(rundir, fresh)
        say(f"{record.role} {record.name} (pid {record.pid}) → {fresh} (pid {new.pid}) in {time.monotonic() - began:.1f} s")


def _await_ready(rundir: RunDir, name: str, old: int, timeout: float, say: Callable[[str], None]) -> None:
    soon = time.monotonic() + SOON
    said = ""

    def ready() -> bool:
        nonlocal said
        record = rundir.last_record(name)
        _ask(rundir, "look", name)
        if record is not None and record.alive and record.pid != old and record.state == "ready":
            return True
        if time.monotonic() > soon and (why := _why_not_ready(rundir, name, old)) != said:
            said = why
            say(f"waiting for {name}: {why}")
        return False

    try:
        if not _until(ready, timeout):
            raise NotDone(f"{name} is not ready after {timeout:g} s: {_why_not_ready(rundir, name, old)}; see {rundir.logs / name}.log")
    except RunDirError as error:
        raise NotDone(str(error)) from None


def _why_not_ready(rundir: RunDir, name: str, old: int) -> str:
    """As far as the run directory tells."""
    services = rundir.services()
    record = next((record for record in services if record.name == name and record.pid != old), None)
    if record is None:
        return "it has not started yet"
    if record.state == "waiting" and record.role != "scheduler" and not any(other.role == "scheduler" for other in services):
        return "no scheduler runs"
    if record.state == "waiting" and record.role != "worker" and not any((s.role, s.state) == ("worker", "ready") for s in services):
        return "no worker is ready"
    return f"it is {record.state}"


def _find(rundir: RunDir, name: str) -> ServiceRecord:
    services = rundir.services()
    found = next((record for record in services if record.name == name), None)
    if found is None:
        raise RunDirError(f"no service {name!r} runs in {rundir.path}; there are: {', '.join(s.name for s in services) or 'none'}")
    return found


def _by_hand(rundir: RunDir, name: str) -> bool:
    """Whether a service is none of the supervisor's that runs here."""
    try:
        reply = ask(rundir, "has", name)
    except RunDirError:  # a supervisor of an older version, which does not know the question
        return False
    return reply is not None and not reply["has"]


def _ask(rundir: RunDir, command: str, name: str) -> dict[str, str]:
    reply = ask(rundir, command, name)
    if reply is None:
        raise RunDirError(f"no `pagewire up` runs in {rundir.path}: start a new service by hand, then `pagewire drain` the old one")
    return reply


def _signal(record: ServiceRecord, number: int) -> None:
    if record.alive:
        os.kill(record.pid, number)


def _until(what: Callable[[], bool], timeout: float) -> bool:
    """Whether it became true in time. Raises NotDone at a signal."""
    deadline = time.monotonic() + timeout
    while not what():
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK)
        # Asked, not waited for: from a wait that was interrupted to its end, by a SIGCONT say, CPython returns what was never written.
        if (came := signal.sigtimedwait(_ends(), 0)) is not None:
            raise NotDone(f"{signal.Signals(came.si_signo).name}: no longer waited for; `pagewire ps` shows what goes on")
    return True
