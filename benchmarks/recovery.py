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
from tests.faults.load import STREAMS, Load, quantile
from tests.faults.test_worker_hangs import FREEZE

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
)


@contextlib.contextmanager
def started(fault: Fault, step: float) -> Iterator[Fleet]:
    """Two workers, a frontend, a scheduler, and a standby if the fault is about one."""
    with fleet(step=step) as running:
        standby = fault is standby_takes_over
        folder = running.rundir.sockets
        binds = {role: f"ipc://{folder}/standby-{role}.sock" for role in ("frontends", "workers")} if standby else {}
        running.scheduler()
        dial: dict[str, tuple[str, ...]] = {"frontends": (), "workers": ()}
        if standby:
            running.scheduler(STANDBY, "--standby", "--bind-frontends", binds["frontends"], "--bind-workers", binds["workers"])
            for role, own in (("frontends", running.rundir.frontends), ("workers", running.rundir.workers)):
                dial[role] = ("--scheduler", own, "--scheduler", binds[role])
        if fault is worker_frozen:
            running.patched_worker("worker-0", FREEZE.format(file=str(running.stack.folder / "freeze")))
        else:
            running.worker("worker-0", *dial["workers"])
        running.worker("worker-1", *dial["workers"])
        running.frontend("frontend-0", *dial["frontends"])
        running.ready(2)
        yield running


def measure(fault: Fault, step: float) -> tuple[float, list[float], int, int]:
    """(detection in s, pauses in s, tokens computed, requests failed) of 48 requests with this fault in their midst."""
    with started(fault, step) as running:
        watches = [Watch(running, name) for name in running.services if name.startswith("scheduler")]
        time.sleep(0.5)  # a tap looks for its subscribers five times a second
        load = Load(running.urls, STREAMS, TOKENS, rounds=1)
        load.well_underway()
        time.sleep(20 * step)
        at, detected = fault(running, watches)
        load.finish()
        running.at_rest()
        failed = int(running.sum("requests_failed", "frontend"))
        for watch in watches:
            watch.close()
        return detected - at, load.pauses(at), sum(watch.computed for watch in watches), failed


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
