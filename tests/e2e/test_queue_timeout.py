"""A request may say how long it waits for a busy worker: `queue_timeout`."""

from __future__ import annotations

import httpx
import pytest

from tests.e2e.stack import stack
from tests.e2e.test_recovery import SLOW_ORACLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LONG = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True, "queue_timeout": 60}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_that_waits_longer_than_it_asked_for_gets_503(streamed: bool) -> None:
    with stack() as made:
        made.up("--runner", "oracle", "--max-num-seqs", "1", env=SLOW_ORACLE)
        url = f"{made.url}/v1/completions"
        with httpx.stream("POST", url, json=LONG, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)  # it runs, which no queue_timeout ends
            answer = httpx.post(url, json={"prompt": "y", "queue_timeout": 0.3, "stream": streamed}, timeout=60)
            assert answer.status_code == 503, answer.text
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("queue_timeout", "queue_timeout")
            assert "queue_timeout" in error["message"]
            assert next(lines) is not None
        assert httpx.post(url, json={"prompt": "y", "queue_timeout": 30}, timeout=60).status_code == 200
