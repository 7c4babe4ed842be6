"""What a client notices of a fault: 48 mixed streams over real processes (oracle runner), one fault, and every byte compared.

    python -m benchmarks.recovery [--step 0.04] [--only NAME]

Detection is the time until the other side acts on the fault; a pause is the longest time without a chunk that one
stream sees after it; recomputed are the tokens computed beyond those of an undisturbed run of the same requests.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date, datetime

import psutil
import zmq

from protocol.codec import decode
from protocol.columns import unpack
from protocol.messages import Models, Plan
from tests.e2e.stack import eventually
from tests.faults.fleet import Fleet, fleet
from tests.faults.link_proxy import DOWN, UP
from tests.faults.load import STREAMS, Load, quantile
from tests.faults.test_attach import ResumingLoad
from tests.faults.test_replace import command
from tests.faults.test_worker_hangs import FREEZE, POISON, poisoned

TOKENS = 120  # of each stream
STANDBY = "scheduler-1"


class Watch(threading.Thread):
    """Reads a scheduler's tap: tokens computed so far, and when it last told frontends that models have changed."""

    def __init__(self, running: Fleet, scheduler: str) -> None:
        super().__init__(daemon=True)
        self.computed = 0
        self.changes: list[float] = []
        self._endpoint = running.rundir.tap(scheduler)
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as tap:
            tap.subscribe(b"out")
            tap.connect(self._endpoint)
            while not self._over.is_set():
                if tap.poll(50):
                    _, _, _, *bodies = tap.recv_multipart()
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


@contextlib.contextmanager
def started(fault: Fault, step: float) -> Iterator[Fleet]:
    """Two workers, a frontend or two, a scheduler, and what else the fault is about: a standby, proxies, marked tokens."""
    env = {"PAGEWIRE_ORACLE_MARKS": f"{ord(POISON)}={MARKS[fault]}"} if fault in MARKS else {}
    with fleet(step=step, env=env, tcp=fault in CUTS) as running:
        dial: dict[str, tuple[str, ...]] = {}
        running.scheduler()
        if fault is standby_takes_over:
            folder = running.rundir.sockets
            binds = {role: f"ipc://{folder}/standby-{role}.sock" for role in ("frontends", "workers")}
            running.scheduler(STANDBY, "--standby", "--bind-frontends", binds["frontends"], "--bind-workers", binds["workers"])
            for role, own in (("frontend", running.rundir.frontends), ("worker", running.rundir.workers)):
                dial[role] = ("--scheduler", own, "--scheduler", binds[f"{role}s"])
        if fault in CUTS:
            for role, port in zip(("frontend", "worker"), running.ports, strict=True):
                dial[role] = ("--scheduler", running.through_proxy(f"{role}-0", port))
        if fault is worker_frozen:
            running.patched_worker("worker-0", FREEZE.format(file=str(running.stack.folder / "freeze")))
        else:
            running.worker("worker-0", *dial.get("worker", ()))
        running.worker("worker-1", *(() if fault in CUTS else dial.get("worker", ())))
        for i in range(1 + (fault in WATCHED)):
            running.frontend(f"frontend-{i}", *dial.get("frontend", ()))
        running.ready(2)
        yield running


def measure(fault: Fault, step: float) -> tuple[float, list[float], int, int]:
    """(detection in s, pauses in s, tokens computed, requests failed) of 48 requests with this fault in their midst.

    A poisoned request of the fault's own is not among them.
    """
    with started(fault, step) as running:
        watches = [Watch(running, name) for name in running.services if name.startswith("scheduler")]
        time.sleep(0.5)  # a tap looks for its subscribers five times a second
        load = (ResumingLoad if fault is frontend_killed else Load)(running.urls, STREAMS, TOKENS, rounds=1)
        load.well_underway()
        time.sleep(20 * step)
        at, detected = fault(running, watches)
        load.finish()
        failed = fault in MARKS
        running.at_rest(failed=int(failed))
        failures = int(running.sum("requests_failed", "frontend")) - failed
        for watch in watches:
            watch.close()
        pauses = load.pauses(at, WATCHED.get(fault, ""))
        return detected - at, pauses, sum(watch.computed for watch in watches), failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.04, help="seconds of a step")
    parser.add_argument("--only", choices=[fault.__name__ for fault in FAULTS[1:]], help="only this fault, and the undisturbed run")
    arguments = parser.parse_args()
    cores, load = psutil.cpu_count(), psutil.getloadavg()[0]
    print(f"{platform.machine()}, {cores} cores, load {load:.1f}, {date.today()}; {STREAMS} streams, steps of {1000 * arguments.step:g} ms")
    print("| fault | detected after, s | pause p50, s | pause p99, s | tokens recomputed | requests failed |")
    print("|---|---|---|---|---|---|")
    undisturbed = 0
    for fault in FAULTS:
        if arguments.only in (None, fault.__name__) or fault is nothing:
            detection, pauses, computed, failed = measure(fault, arguments.step)
            undisturbed = undisturbed or computed
            name = (fault.__doc__ or "").rstrip(".")
            more = max(0, computed - undisturbed)
            figures = f"{detection:.2f} | {quantile(pauses, 0.5):.2f} | {quantile(pauses, 0.99):.2f} | {more} | {failed}"
            print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
