"""The soak in small: `make soak MINUTES=60` is the real one."""

from __future__ import annotations

import pytest

from tests.faults import soak


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_random_faults_lose_nothing() -> None:
    soak.run(minutes=0.3, seed=7)
