"""What holds for all tests, and for the processes that they start."""

from __future__ import annotations

import contextlib
import os
import signal

# torch's threads are to sleep while they wait for one another: on cores that are shared, one that spins takes the core
# that its neighbour needs, and tests of tiny matrices took three to eight times the CPU. OpenMP reads this with torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell starts what runs in the background with Ctrl-C ignored, which the programs under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing may depend on the speed of the machine: neither how long an example takes, nor how long its data take.
with contextlib.suppress(ImportError):  # not on every machine with a card
    from hypothesis import HealthCheck, settings

    settings.register_profile("any speed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any speed")
