"""The timeline of a start: what is read from a worker's log, and how it is printed."""

from __future__ import annotations

import pytest

from benchmarks.gpu_shapes import model_folder
from benchmarks.gpu_start import LINE, run, table

LOG = """\
2026-12-01T05:00:00.250 INFO worker-0 worker: started: pid 7, incarnation 9, run directory /tmp/x
2026-12-01T05:00:03.500 DEBUG worker-0 worker: start: torch imported
2026-12-01T05:00:03.600 INFO worker-0 worker: found the scheduler
2026-12-01T05:00:06.000 INFO worker-0 worker: loaded tiny: 5 blocks of 16 tokens, 4 slots
"""


def test_the_phases_are_those_that_the_log_names() -> None:
    assert [found[2] for found in map(LINE.match, LOG.splitlines()) if found] == ["started", "start: torch imported", "loaded"]


def test_each_column_says_when_and_how_long_after_the_line_above() -> None:
    printed = table({"started": 0.25, "loaded": 9.0, "first token": 10.0}, {"started": 0.5, "loaded": 6.0, "first token": 6.5})
    assert [line.split() for line in printed.splitlines()[1:]] == [
        ["started", "0.25", "+0.25", "0.50", "+0.50"],
        ["loaded", "9.00", "+8.75", "6.00", "+5.50"],
        ["first", "token", "10.00", "+1.00", "6.50", "+0.50"],
    ]


@pytest.mark.slow
def test_it_runs_without_a_card(tmp_path_factory: pytest.TempPathFactory) -> None:
    with model_folder("tiny") as folder:
        phases = run(str(folder), {"load_format": "dummy", "device": "cpu"}, tmp_path_factory.mktemp("cache"))
    assert list(phases) == ["started", "loaded", "first token"]
    assert list(phases.values()) == sorted(phases.values())
