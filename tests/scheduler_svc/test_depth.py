"""The depth of a pipeline, on devices whose waiting is given as a function of the plans in flight."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scheduler_svc.depth import LEAST, SLACK, Depth

STEP = 0.001  # seconds
ROUND_TRIP = 0.0005


def served(depth: Depth, waiting: Callable[[int], float], seconds: float, begin: float = 0.0) -> list[int]:
    """Feed `depth` with steps for a while; `waiting(plans)` is the share of time without work. Returns `wanted` at each step."""
    now, wanted = begin, []
    while now < begin + seconds:
        if depth.plans == 1:
            now += STEP + ROUND_TRIP
            depth.measured(ROUND_TRIP, STEP, now)
        else:
            share = waiting(depth.wanted)
            idle = STEP * share / (1 - share)
            now += STEP + idle
            depth.took(STEP, idle, now)
        wanted.append(depth.wanted)
    return wanted


def at_full(wanted: list[int]) -> float:
    """The share of steps with all the slack."""
    return sum(plans == LEAST + SLACK for plans in wanted) / len(wanted)


def started() -> Depth:
    depth = Depth(0)
    depth.measured(ROUND_TRIP, STEP, 0.0)
    return depth


def test_a_device_that_never_waits_gets_no_slack() -> None:
    assert set(served(started(), lambda plans: 0.0, 30.0)) == {LEAST}


def test_slack_that_leaves_some_waiting_but_less_than_before_stays() -> None:
    wanted = served(started(), lambda plans: 0.09 if plans < LEAST + SLACK else 0.025, 60.0)
    assert at_full(wanted) > 0.9


def test_waiting_that_grows_while_there_is_slack_does_not_cost_the_slack() -> None:
    depth = started()
    served(depth, lambda plans: 0.04, 2.2)
    assert depth.wanted == LEAST + SLACK
    wanted = served(depth, lambda plans: 0.25 if plans == LEAST else 0.07, 30.0, begin=2.2)
    assert at_full(wanted) > 0.9


def test_slack_that_is_missed_only_later_comes_back_then() -> None:
    depth = started()
    served(depth, lambda plans: 0.04, 10.0)
    assert depth.wanted == LEAST
    served(depth, lambda plans: 0.25 if plans == LEAST else 0.02, 20.0, begin=10.0)
    assert depth.wanted == LEAST + SLACK


def test_one_long_stall_does_not_cost_the_slack() -> None:
    depth = started()
    served(depth, lambda plans: 0.05 if plans < LEAST + SLACK else 0.03, 2.2)
    assert depth.wanted == LEAST + SLACK
    depth.took(STEP, 0.3, 2.5)
    wanted = served(depth, lambda plans: 0.05 if plans < LEAST + SLACK else 0.03, 30.0, begin=2.5)
    assert at_full(wanted) > 0.9


@pytest.mark.parametrize("share", [0.015, 0.3])
def test_slack_that_does_not_help_is_given_back(share: float) -> None:
    wanted = served(started(), lambda plans: share, 60.0)
    assert at_full(wanted) < 0.1
    assert sum(plans == LEAST for plans in wanted) / len(wanted) > 0.85


def test_a_plan_that_is_alone_by_itself_ends_no_window() -> None:
    depth, now = started(), 0.0
    for _ in range(100):
        served(depth, lambda plans: 0.1 if plans == LEAST else 0.0, 0.1, begin=now)
        now += 0.1
        if depth.plans > 1:
            depth.measured(ROUND_TRIP, STEP, now)
    assert depth.wanted > LEAST


def test_a_given_depth_stays() -> None:
    depth = Depth(3)
    assert set(served(depth, lambda plans: 0.5, 10.0)) == {3}
