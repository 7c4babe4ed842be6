"""How many threads the model uses on the CPU, and how they wait for one another.

The services share the cores. GNU OpenMP's threads spin by default while they wait, and a thread that spins on a core which
a neighbour needs keeps the very thread from running that it waits for: one linear layer became 60 times slower. Its
settings are read when torch is first imported, so this comes before.
"""

from __future__ import annotations

import os
import sys

_MOST = 16  # more threads than this gain nothing on matrices of a few million weights


def choose_threads(wanted: int) -> int:
    """Set how threads wait, unless the environment says so already, and return their number (0: chosen).

    The environment must be set before torch is imported; afterwards only the number counts.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return wanted or min(len(os.sched_getaffinity(0)), _MOST)
