"""What a client notices of a fault: 48 mixed streams over real processes (oracle runner), one fault, and every byte compared.

    python -m benchmarks.recovery [--step 0.04] [--only NAME]

Detection is the time until the other side acts on the fault; a pause is the longest time without a chunk that one
stream sees after it; recomputed are the tokens computed beyond those of an undisturbed run of the same requests.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import time
from collections.abc import Iterator
from datetime import date

import psutil

from benchmarks.ending import end_in_order
from benchmarks.faults import CUTS, FAULTS, MARKS, WATCHED, Fault, Watch, frontend_killed, nothing, standby_takes_over, worker_frozen
from tests.faults.fleet import Fleet, fleet
from tests.faults.load import STREAMS, Load, quantile
from tests.faults.test_attach import ResumingLoad
from tests.faults.test_worker_hangs import FREEZE, POISON

TOKENS = 120  # of each stream
STANDBY = "scheduler-1"


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
        if not watches[0].hears.wait(30):
            raise SystemExit("the scheduler's tap says nothing")
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
    end_in_order()
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
