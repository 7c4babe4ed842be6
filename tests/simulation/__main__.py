"""Run many seeds of every mix: `python -m tests.simulation --seeds 200 [--mix NAME] [--seed N]`."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from tests.simulation.world import MIXES, World


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds, spread over the mixes")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--mix", choices=sorted(MIXES), help="only this mix")
    parser.add_argument("--keep-going", action="store_true", help="report every seed that fails, not only the first")
    arguments = parser.parse_args()
    mixes = [MIXES[arguments.mix]] if arguments.mix else list(MIXES.values())
    began, failed = time.monotonic(), 0
    counts: dict[str, int] = {}
    for i in range(arguments.first, arguments.first + arguments.seeds):
        mix = mixes[i % len(mixes)]
        world = World(i, mix)
        try:
            world.run()
        except Exception:
            failed += 1
            print(f"seed {i}, mix {mix.name!r} failed:", file=sys.stderr)
            traceback.print_exc()
            if not arguments.keep_going:
                return 1
        for what, n in world.happened().items():
            counts[what] = counts.get(what, 0) + n
    seconds = time.monotonic() - began
    print(f"{arguments.seeds - failed} passed, {failed} failed in {seconds:.0f} s")
    print(", ".join(f"{what} {n}" for what, n in sorted(counts.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
