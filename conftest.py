"""What holds for all tests, and for the processes that they start."""

from __future__ import annotations

import contextlib
import os

# torch's threads are to sleep while they wait for one another: on cores that are shared, one that spins takes the core
# that its neighbour needs, and tests of tiny matrices took three to eight times the CPU. OpenMP reads this with torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Nothing may depend on the speed of the machine: neither how long an example takes, nor how long its data take.
with contextlib.suppress(ImportError):  # not on every machine with a card
    from hypothesis import HealthCheck, settings

    settings.register_profile("any speed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any speed")
