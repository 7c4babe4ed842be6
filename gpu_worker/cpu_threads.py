"""How many threads the model uses on the CPU, and how they wait for one another.

The services share the cores. GNU OpenMP's threads spin for long by default while they wait, and a thread that spins on a
core which a neighbour needs keeps the very thread from running that it waits for: one linear layer became 60 times slower.
Threads that sleep at once (OMP_WAIT_POLICY=passive) must be woken for each of a step's hundred linears, which takes half as
long again at batch 1. So they spin for about as long as the pauses between two linears, then sleep. OpenMP reads its
settings when torch is first imported; this comes before.
"""

from __future__ import annotations

import os
import sys

_SPINS = 5000  # some 100 µs
_MOST = 16  # more threads than this gain nothing on matrices of a few million weights


def choose_threads(wanted: int) -> int:
    """Set how threads wait, unless the environment says so already, and return their number (0: chosen).

    The environment must be set before torch is imported; afterwards only the number counts.
    """
    if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)
    return wanted or min(len(os.sched_getaffinity(0)), _MOST)
