"""The faults of `benchmarks/recovery.py`, each injected into running services, and when the other side acted on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime

import zmq

from protocol.codec import decode
from protocol.columns import unpack
from protocol.messages import Models, Plan
from tests.e2e.stack import eventually
from tests.faults.fleet import Fleet
from tests.faults.link_proxy import DOWN, UP
from tests.faults.test_replace import command
from tests.faults.test_worker_hangs import poisoned


class Watch(threading.Thread):
    """Reads a scheduler's tap: tokens computed so far, and when it last told frontends that models have changed."""

    def __init__(self, running: Fleet, scheduler: str) -> None:
        super().__init__(daemon=True)
        self.computed = 0
        self.changes: list[float] = []
        self._endpoint = running.rundir.tap(scheduler)
        self.hears = threading.Event()  # a tap looks for its subscribers five times a second
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as tap:
            tap.subscribe(b"out")
            tap.connect(self._endpoint)
            while not self._over.is_set():
                if tap.poll(50):
                    _, _, _, *bodies = tap.recv_multipart()
                    self.hears.set()
                    for body in bodies:
                        self._take(body)

    def _take(self, body: bytes) -> None:
        message = decode(body)
        if isinstance(message, Plan):
            self.computed += int(unpack(message.counts).sum())
        elif isinstance(message, Models):
            self.changes.append(time.monotonic())

    def close(self) -> None:
        self._over.set()
        self.join()


Fault = Callable[[Fleet, list[Watch]], tuple[float, float]]  # returns when it happened, and when it was detected


def _told(watches: list[Watch], after: float) -> float:
    """When a scheduler told of a lost worker."""
    found = eventually(lambda: [t for watch in watches for t in watch.changes if t > after])
    return float(min(found))


def _log_time(running: Fleet, name: str, words: str, since: datetime) -> float:
    """Seconds from `since` until a service logged something."""

    def look() -> list[float]:
        lines = [line for line in running.services[name].output().splitlines() if words in line]
        times = [(datetime.fromisoformat(line.split()[0]) - since).total_seconds() for line in lines]
        return [t for t in times if t > 0]

    return float(min(eventually(look)))


def nothing(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """Undisturbed: how far apart chunks are."""
    now = time.monotonic()
    return now, now


def worker_killed(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """SIGKILL one of two workers."""
    at = running.kill("worker-0")
    return at, _told(watches, at)


def worker_restarted(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """SIGKILL one of two workers, started again at once."""
    at = running.kill("worker-0")
    running.worker("worker-0")
    return at, _told(watches, at)


def both_workers_killed(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """SIGKILL both workers, started again at once."""
    at = running.kill("worker-0")
    running.kill("worker-1")
    for name in ("worker-0", "worker-1"):
        running.worker(name)
    return at, _told(watches, at)


def worker_stopped(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """SIGSTOP a worker for 5 s."""
    with running.stopped("worker-0") as at:
        told = _told(watches, at)
        time.sleep(max(0.0, at + 5 - time.monotonic()))
    return at, told


def worker_frozen(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """A worker's interpreter stands still for 4 s, its I/O threads do not."""
    at = time.monotonic()
    (running.stack.folder / "freeze").touch()
    return at, _told(watches, at)


def scheduler_restarted(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """SIGKILL the scheduler, started again at once."""
    since = datetime.now()
    at = running.kill("scheduler-0")
    running.scheduler()
    return at, at + _log_time(running, "frontend-0", "session over", since)


def standby_takes_over(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """SIGKILL the scheduler, a standby takes over."""
    since = datetime.now()
    at = running.kill("scheduler-0")
    return at, at + _log_time(running, "frontend-0", "session over", since)


def all_killed(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """SIGKILL the scheduler and both workers, started again at once."""
    since = datetime.now()
    at = running.kill("scheduler-0")
    for name in ("worker-0", "worker-1"):
        running.kill(name)
        running.worker(name)
    running.scheduler()
    return at, at + _log_time(running, "frontend-0", "session over", since)


def scheduler_and_worker_killed(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """SIGKILL the scheduler and a worker, started again at once."""
    since = datetime.now()
    at = running.kill("scheduler-0")
    running.kill("worker-0")
    running.worker("worker-0")
    running.scheduler()
    return at, at + _log_time(running, "frontend-0", "session over", since)


def worker_drained(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """`pagewire drain` of one of two workers."""
    at = time.monotonic()
    drained = command(running.stack, "drain", "worker-0")
    assert drained.returncode == 0, drained.stderr
    return at, at


def frontend_killed(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """SIGKILL one of two frontends; its streams go on at the other (their pauses)."""
    at = running.kill("frontend-0")
    return at, at  # each client sees its connection break


def frontend_stopped(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """SIGSTOP one of two frontends for 5 s (pauses of the other's streams)."""
    with running.stopped("frontend-0") as at:
        eventually(lambda: running.figure("scheduler-0", "wire_session_closed") > 0)
        told = time.monotonic()
        time.sleep(max(0.0, at + 5 - time.monotonic()))
    return at, told


def _poison(running: Fleet) -> tuple[float, float]:
    at = time.monotonic()
    seen = poisoned(running)
    assert seen.error is not None, "the poisoned request ended well"
    return at, time.monotonic()


def _poison_kept(running: Fleet) -> tuple[float, float]:
    with running.kept("worker-0", "worker-1"):
        at, over = _poison(running)
        eventually(lambda: running.sum("workers_ready", "scheduler") == 2, 60)
    return at, over


def step_raises(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """A request whose steps raise (until it has failed)."""
    return _poison(running)


def step_computes_nan(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """A request that computes NaN (until it has failed)."""
    return _poison(running)


def step_crashes(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """A request that kills its worker each time (until it has failed)."""
    return _poison_kept(running)


def step_hangs(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """A request that hangs its worker each time (until it has failed)."""
    return _poison_kept(running)


def _cut(running: Fleet, name: str, link: str, seconds: float) -> float:
    proxy = running.proxies[name]
    at = time.monotonic()
    proxy.hold(link, UP, DOWN)
    time.sleep(seconds)
    assert proxy.held_bytes() > 0, "nothing was held"
    proxy.release()
    return at


def frontend_link_cut_briefly(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """The frontend's link holds all bytes for 0.3 s."""
    at = _cut(running, "frontend-0", "first", 0.3)
    return at, at


def frontend_link_cut(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """The frontend's link holds all bytes for 2 s."""
    since = datetime.now()
    at = _cut(running, "frontend-0", "first", 2.0)
    return at, at + _log_time(running, "frontend-0", "session over", since)


def worker_link_cut(running: Fleet, watches: list[Watch]) -> tuple[float, float]:
    """A worker's results hold for 2 s."""
    at = _cut(running, "worker-0", "results", 2.0)
    return at, _told(watches, at)


FAULTS: tuple[Fault, ...] = (
    nothing,
    worker_killed,
    worker_restarted,
    both_workers_killed,
    worker_stopped,
    worker_frozen,
    scheduler_restarted,
    standby_takes_over,
    all_killed,
    scheduler_and_worker_killed,
    worker_drained,
    frontend_killed,
    frontend_stopped,
    frontend_link_cut_briefly,
    frontend_link_cut,
    worker_link_cut,
    step_raises,
    step_computes_nan,
    step_crashes,
    step_hangs,
)
MARKS = {step_raises: "raise", step_computes_nan: "nan", step_crashes: "crash", step_hangs: "hang"}
CUTS = (frontend_link_cut_briefly, frontend_link_cut, worker_link_cut)
WATCHED = {frontend_killed: "frontend-0", frontend_stopped: "frontend-1"}  # whose streams' pauses count, with two frontends
