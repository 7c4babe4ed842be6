"""What holds for all tests, and for the processes that they start."""

from __future__ import annotations

import os

# torch's threads are to sleep while they wait for one another: on cores that are shared, one that spins takes the core
# that its neighbour needs, and tests of tiny matrices took three to eight times the CPU. OpenMP reads this with torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
