"""The real model computes a prompt once: for those who repeat it, and for all choices of one request."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest

from tests.e2e.stack import Stack, eventually, stack

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(180)]


FIGURES = ("requests_finished", "prefix_queries", "prefix_hits", "blocks_taken", "wire_session_closed")


def complete(made: Stack, prompt: list[int], **more: object) -> tuple[dict[str, Any], dict[str, float]]:
    """The answer, and by how much the scheduler's figures have grown with it."""

    def figures() -> dict[str, float]:
        metrics = made.metrics()
        return {name: metrics.get(f'pagewire_scheduler_{name}{{name="scheduler-0"}}', 0.0) for name in FIGURES}

    def ended() -> dict[str, float] | None:
        return found if (found := figures())["requests_finished"] > before["requests_finished"] else None

    before = figures()
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **more}
    answer = httpx.post(f"{made.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    after = eventually(ended)
    return answer.json(), {name: after[name] - before[name] for name in FIGURES}


def test_a_prompt_is_computed_once() -> None:
    with stack() as made:
        made.up("--block-size", "16")
        for number in range(5):
            prompts = [
                [random.Random(seed + number).randrange(100, 20_000) for _ in range(length)] for seed, length in ((10, 512), (20, 520))
            ]
            first, computed = complete(made, prompts[0])
            second, found = complete(made, prompts[0])
            _, forked = complete(made, prompts[1], n=4, temperature=1, seed=3)
            if not any(grown["wire_session_closed"] for grown in (computed, found, forked)):
                break  # else the machine stood still for a second, and a request was admitted twice
        assert (computed["prefix_queries"], computed["prefix_hits"], found["prefix_queries"]) == (512, 0, 512)
        assert 512 - found["prefix_hits"] <= 16, "a second identical prompt prefills at most one block"
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 496
        assert first["choices"][0]["text"] == second["choices"][0]["text"]
        # 32 full blocks once, and the partly filled 33rd for each of the four
        assert forked["blocks_taken"] == 32 + 4
