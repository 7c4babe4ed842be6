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

        def chunks(frontend: str) -> list[float]:
            return [t for seen in list(load.seen) if seen.frontend == frontend for t in seen.times]

        def stop() -> None:
            before = len(chunks("frontend-1"))
            with running.stopped("frontend-0") as began:
                time.sleep(10)
                # Clients may read late what had been sent: seconds, but not to the end.
                assert max(chunks("frontend-0")) < began + 8, "a stopped frontend went on"
                assert len(chunks("frontend-1")) - before > 200
            eventually(lambda: running.sum("session_open", "frontend") == 2)
            stops.append(began)

        stops: list[float] = []
        running.costs_no_session(stop, "frontend-1")
        load.finish()
        running.at_rest()
        running.answered(load)
        mine, others = load.pauses(stops[-1], "frontend-0"), load.pauses(stops[-1], "frontend-1")
        assert quantile(mine, 0.5) > 5
        # Theirs come and go while one stands still: no slot and no plan waits for it.
        assert quantile(others, 0.5) < 5
