"""How long a poisoned request holds up innocent streams (simulated seconds), and how many workers it takes along."""

from __future__ import annotations

import pytest

from tests.simulation.neighbours import Neighbours


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("effect", "workers", "after", "median", "longest"),
    [
        pytest.param("crash", 1, 0, 5.0, 5.0, id="the only worker dies at once"),
        pytest.param("crash", 1, 50, 7.0, 7.0, id="the only worker dies after 50 tokens"),
        pytest.param("hang", 1, 0, 25.0, 32.0, id="the only worker hangs at once"),
        pytest.param("crash", 2, 0, 2.0, 2.0, id="one of two dies at once"),
        pytest.param("crash", 2, 50, 2.0, 5.0, id="one of two dies after 50 tokens"),
        pytest.param("hang", 2, 0, 2.5, 3.0, id="one of two hangs at once"),
        pytest.param("hang", 2, 50, 5.0, 10.0, id="one of two hangs after 50 tokens"),
        pytest.param("hang", 3, 0, 2.5, 3.0, id="one of three hangs at once"),
    ],
)
def test_innocent_streams_wait_no_longer(effect: str, workers: int, after: int, median: float, longest: float) -> None:
    cost = Neighbours(effect, workers, after).cost()
    assert cost.median <= median, cost
    assert cost.longest <= longest, cost


def test_one_worker_alone_tries_who_has_failed() -> None:
    """A first death may be an accident, and its requests go on at once elsewhere; from then on others are spared."""
    deaths = Neighbours("crash", 2).cost().deaths
    assert min(deaths.values()) == 1, deaths
