"""Run many seeds of every mix: `python -m tests.simulation --seeds 200 [--mix NAME] [--seed N]`."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.world import MIXES, collect_between_seeds, run_one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds, spread over the mixes")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--mix", choices=sorted(MIXES), help="only this mix")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--keep-going", action="store_true", help="report every seed that fails, not only the first")
    arguments = parser.parse_args()
    names = [arguments.mix] if arguments.mix else list(MIXES)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    began, passed, failed = time.monotonic(), 0, 0
    counts: dict[str, int] = {}
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), collect_between_seeds) as pool:
        for seed, name, error, happened in pool.map(run_one, seeds, [names[seed % len(names)] for seed in seeds], chunksize=4):
            if error:
                failed += 1
                print(f"seed {seed}, mix {name!r} failed:\n{error}", file=sys.stderr)
                if not arguments.keep_going:
                    pool.shutdown(wait=False, cancel_futures=True)
                    break
            else:
                passed += 1
            for what, n in happened.items():
                counts[what] = counts.get(what, 0) + n
    print(", ".join(f"{what} {n}" for what, n in sorted(counts.items())))
    print(f"simulation: {time.monotonic() - began:.0f} s")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
