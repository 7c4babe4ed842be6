"""A frontend stops for a while: its own streams wait, nobody else's do."""

from __future__ import annotations

import time

import pytest

from tests.e2e.stack import eventually
from tests.faults.fleet import serving
from tests.faults.load import quantile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_frontend_is_stopped_for_ten_seconds_and_the_others_keep_their_pace() -> None:
    with serving(frontends=2, max_tokens=100) as (running, load):
        running.fresh()
        sessions = running.figure("frontend-1", "session_closed")
        before = len([t for seen in load.seen if seen.frontend == "frontend-1" for t in seen.times])
        with running.stopped("frontend-0") as began:
            time.sleep(10)
            stopped = [t for seen in load.seen if seen.frontend == "frontend-0" for t in seen.times]
            assert max(stopped) < began + 0.5, "a stopped frontend went on"
            flowed = len([t for seen in load.seen if seen.frontend == "frontend-1" for t in seen.times]) - before
        load.finish()
        running.at_rest()
        running.answered(load)
        assert running.figure("frontend-1", "session_closed") == sessions
        assert flowed > 200
        mine, others = load.pauses(began, "frontend-0"), load.pauses(began, "frontend-1")
        assert quantile(mine, 0.5) > 9
        # Theirs come and go while one stands still: no slot and no plan waits for it.
        assert quantile(others, 0.5) < 3
        eventually(lambda: running.sum("session_open", "frontend") == 2)
