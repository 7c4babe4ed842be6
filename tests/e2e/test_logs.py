"""Logs of a stack as JSON: every line one object, and a request's by the id that its client has."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.e2e.stack import Stack, eventually, stack


def lines(made: Stack, name: str) -> list[dict[str, Any]]:
    *whole, _ = (made.run_dir / "logs" / f"{name}.log").read_text().split("\n")
    return [json.loads(line) for line in whole]


@pytest.mark.slow
def test_a_request_is_found_in_the_log_by_its_id() -> None:
    with stack() as made:
        made.up("--runner", "oracle", "--log-format", "json", "--log-level", "debug")
        body = {"prompt": "hi", "max_tokens": 3, "ignore_eos": True}
        answer = httpx.post(f"{made.url}/v1/completions", json=body, headers={"x-tenant": "somebody"}, timeout=60).json()
        request = answer["id"].removeprefix("cmpl-")
        [line] = eventually(lambda: [line for line in lines(made, "frontend-0") if line.get("request") == request])
        assert line.pop("seconds") > 0
        assert (
            line.items()
            >= {
                "level": "DEBUG",
                "service": "frontend-0",
                "message": "request ended",
                "tenant": "somebody",
                "prompt_tokens": 2,
                "completion_tokens": 3,
                "finish": "length",
            }.items()
        )
        for name in ("scheduler-0", "worker-0", "admin"):
            assert {line["service"] for line in lines(made, name)} == {name}
