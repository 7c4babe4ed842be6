"""Random faults under mixed streams for as long as asked: `python -m tests.faults.soak --minutes 60 [--seed N]`.

Everything random comes from the seed, which is printed; the moments depend on the machine. After each fault the stack
must become whole again; at the end every byte is compared, and everything must have been given back.
"""

from __future__ import annotations

import argparse
import random
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tests.e2e.stack import eventually
from tests.faults.fleet import Fleet, fleet
from tests.faults.link_proxy import DOWN, UP, LinkProxy
from tests.faults.load import Load, quantile

WORKERS = ("worker-0", "worker-1")
ROUND = 60.0  # seconds of one load, whose streams are then compared


class Soak:
    """A fleet over TCP: worker-0 and frontend-0 go through proxies, worker-1 and frontend-1 do not."""

    def __init__(self, running: Fleet, rng: random.Random) -> None:
        self.running = running
        self.rng = rng
        frontends, workers = running.ports
        self.proxies = {"frontend-0": LinkProxy(frontends), "worker-0": LinkProxy(workers)}
        running.scheduler()
        for name in WORKERS:
            self.worker(name)
        running.frontend("frontend-0", "--scheduler", f"tcp://127.0.0.1:{self.proxies['frontend-0'].port}")
        running.frontend("frontend-1")
        running.ready(2)

    def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()

    def worker(self, name: str) -> None:
        proxy = self.proxies.get(name)
        self.running.worker(name, *(("--scheduler", f"tcp://127.0.0.1:{proxy.port}") if proxy else ()))

    # ------------------------------------------------------------ faults: each says what it does

    def kill_worker(self) -> str:
        name = self.rng.choice(WORKERS)
        self.running.kill(name)
        time.sleep(self.rng.uniform(0, 3))
        self.worker(name)
        return f"killed {name}"

    def kill_workers(self) -> str:
        for name in WORKERS:
            self.running.kill(name)
        time.sleep(self.rng.uniform(0, 6))
        for name in WORKERS:
            self.worker(name)
        return "killed both workers"

    def kill_scheduler(self) -> str:
        self.running.kill("scheduler-0")
        time.sleep(self.rng.uniform(0, 3))
        self.running.scheduler()
        return "killed the scheduler"

    def kill_scheduler_and_worker(self) -> str:
        name = self.rng.choice(WORKERS)
        self.running.kill(name)
        self.running.kill("scheduler-0")
        self.running.scheduler()
        self.worker(name)
        return f"killed the scheduler and {name}"

    def stop(self) -> str:
        name = self.rng.choice(["scheduler-0", "frontend-0", "frontend-1", *WORKERS])
        seconds = self.rng.choice((0.3, 1.5, 5.0, 10.0))
        with self.running.stopped(name):
            time.sleep(seconds)
        return f"stopped {name} for {seconds} s"

    def cut(self) -> str:
        name, link = self.rng.choice([("frontend-0", "first"), ("worker-0", "first"), ("worker-0", "results")])
        ways = self.rng.choice([(UP,), (DOWN,), (UP, DOWN)])
        seconds = self.rng.choice((0.3, 2.0, 6.0, 6.0, 15.0, 60.0))
        proxy = self.proxies[name]
        held = proxy.held_bytes()
        proxy.hold(link, *ways)
        until = time.monotonic() + seconds
        eventually(lambda: proxy.held_bytes() > held)
        time.sleep(max(0.0, until - time.monotonic()))
        proxy.release()
        return f"held the {link} link of {name} {' and '.join(ways)} for {seconds} s"

    def disconnect(self) -> str:
        name, link = self.rng.choice([("frontend-0", "first"), ("worker-0", "first"), ("worker-0", "results")])
        halves = self.rng.choice([(UP,), (DOWN,), (UP, DOWN)])
        closed = self.proxies[name].close_link(link, *halves)
        return f"closed {closed} connection(s) of {name}, {' and '.join(halves)}"

    def faults(self) -> list[Callable[[], str]]:
        return [
            self.kill_worker,
            self.kill_workers,
            self.kill_scheduler,
            self.kill_scheduler_and_worker,
            self.stop,
            self.cut,
            self.disconnect,
        ]

    def whole(self) -> None:
        """Wait until the stack has recovered."""
        eventually(lambda: self.running.sum("workers_ready", "scheduler") == 2, 60)
        eventually(lambda: self.running.sum("session_open", "frontend") == 2, 60)


@contextmanager
def soaked(rng: random.Random) -> Iterator[Soak]:
    with ExitStack() as stack:
        running = stack.enter_context(fleet(tcp=True))
        made = Soak(running, rng)
        stack.callback(made.close)
        yield made


def run(minutes: float, seed: int) -> None:
    """Raises AssertionError if anything is lost."""
    print(f"soak: seed {seed}, {minutes:g} minutes", flush=True)
    rng = random.Random(seed)
    end = time.monotonic() + 60 * minutes
    asked = faults = 0
    with soaked(rng) as made:
        while time.monotonic() < end:
            load = Load(made.running.urls, first=asked)
            load.well_underway()
            began = time.monotonic()
            while time.monotonic() < min(end, began + ROUND):
                print(f"{60 * minutes - (end - time.monotonic()):7.1f} s: {rng.choice(made.faults())()}", flush=True)
                faults += 1
                made.whole()
                time.sleep(rng.uniform(0, 4))
            load.finish(180)
            made.running.at_rest()
            asked += len(load.seen)
            pauses = load.pauses(began)
            print(f"{asked} streams right after {faults} faults; longest pause {quantile(pauses, 1.0):.1f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="drawn if not given, and printed")
    arguments = parser.parse_args()
    run(arguments.minutes, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
