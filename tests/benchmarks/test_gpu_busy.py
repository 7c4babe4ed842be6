"""The busy share of a card from the intervals of its kernels."""

from __future__ import annotations

import pytest

from benchmarks.gpu_busy import busy_share


def test_kernels_that_overlap_are_counted_once_and_gaps_inside_a_step_are_idle() -> None:
    step = [(0, 10, "prepare"), (5, 40, "a"), (20, 30, "inside a"), (60, 90, "b")]
    kernels = [(start + 100 * i, end + 100 * i, name) for i in range(3) for start, end, name in step]
    share, steps = busy_share(kernels[::-1], "prepare")
    assert steps == 2
    assert share == pytest.approx(0.7)


def test_only_what_lies_between_the_first_and_the_last_mark_counts() -> None:
    kernels = [(-500, 5, "early"), (0, 10, "prepare"), (90, 150, "late"), (100, 110, "prepare")]
    assert busy_share(kernels, "prepare")[0] == pytest.approx(0.2)


def test_without_marks_all_counts_and_without_kernels_there_is_no_share() -> None:
    assert busy_share([(0, 10, "x"), (30, 40, "y")], "prepare") == (0.5, 0)
    with pytest.raises(ValueError, match="0 kernels"):
        busy_share([], "prepare")
