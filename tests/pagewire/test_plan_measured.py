"""The planner beside a worker that runs: the memory that it says is the memory that is taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pagewire.plan import Setup, estimate_memory

BLOCKS = 600


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize(("dtype", "sequences"), [("auto", 256), ("float32", 16)])
def test_the_plan_is_within_3_percent_of_what_a_worker_on_the_cpu_grows_by(dtype: str, sequences: int) -> None:
    command = [sys.executable, "-m", "tests.pagewire.worker_memory", dtype, str(sequences), str(BLOCKS)]
    printed = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, timeout=300, check=True).stdout
    planned = estimate_memory("", Setup(device="cpu", dtype=dtype, max_num_seqs=sequences)).total(BLOCKS)
    assert abs(planned / int(printed) - 1) < 0.03, f"planned {planned >> 20} MiB, measured {int(printed) >> 20} MiB"
