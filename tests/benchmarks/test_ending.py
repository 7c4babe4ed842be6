"""What a benchmark starts ends with it, also when it is told to end in the middle."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.pagewire.processes import eventually, gone, running

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STARTS = re.compile(r"Popen\(|Stack\(|\bstack\(\)|fleet\(")  # programs of its own


def starters() -> list[str]:
    return sorted(path.stem for path in BENCHMARKS.glob("*.py") if STARTS.search(path.read_text()) and "__main__" in path.read_text())


@pytest.mark.parametrize("name", starters())
def test_every_benchmark_that_starts_programs_ends_in_order(name: str) -> None:
    assert re.search(r"(?m)^def main\(\) -> None:\n(    \"\"\".*\"\"\"\n)?    end_in_order\(\)$", (BENCHMARKS / f"{name}.py").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("at_rest", "--runner", "oracle"),
        ("overload", "--seconds", "60"),
        ("recovery", "--only", "worker_killed"),
        ("pipeline_busy", "--steps", "8", "--round-trips", "0"),
        ("frontend_stream", "--streams", "2"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_benchmark_that_is_told_to_end_leaves_nothing_running(arguments: tuple[str, ...]) -> None:
    with running([sys.executable, "-m", f"benchmarks.{arguments[0]}", *arguments[1:]]) as program:
        started = eventually(lambda: family if {"scheduler_svc", "scheduler"} & words(family := program.family()) else None)
        os.kill(program.pid, signal.SIGTERM)
        assert program.wait() == 128 + signal.SIGTERM, program.output
        eventually(lambda: gone(started))


def words(family: list[psutil.Process]) -> set[str]:
    found: set[str] = set()
    for process in family:
        try:
            found.update(process.cmdline())
        except psutil.NoSuchProcess:
            continue
    return found
