"""The real model computes a prompt once: for those who repeat it, and for all choices of one request."""

from __future__ import annotations

import random

import httpx
import pytest

from tests.e2e.stack import Stack, eventually, stack

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(180)]


def counter(made: Stack, name: str) -> float:
    return made.metrics().get(f'pagewire_scheduler_{name}{{name="scheduler-0"}}', 0.0)


def complete(made: Stack, prompt: list[int], **more: object) -> dict[str, dict[str, int]]:
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **more}
    answer = httpx.post(f"{made.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_prompt_is_computed_once() -> None:
    prompts = [[random.Random(seed).randrange(100, 20_000) for _ in range(length)] for seed, length in ((1, 512), (2, 520))]
    with stack() as made:
        made.up("--block-size", "16")
        first = complete(made, prompts[0])
        eventually(lambda: counter(made, "prefix_queries") == 512)
        assert counter(made, "prefix_hits") == 0
        second = complete(made, prompts[0])
        eventually(lambda: counter(made, "prefix_queries") == 1024)
        assert 512 - counter(made, "prefix_hits") <= 16, "a second identical prompt prefills at most one block"
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 496  # type: ignore[call-overload]
        assert first["choices"][0]["text"] == second["choices"][0]["text"]  # type: ignore[index]

        before = counter(made, "blocks_taken")
        complete(made, prompts[1], n=4, temperature=1, seed=3)
        # 32 full blocks once, and the partly filled 33rd for each of the four
        eventually(lambda: counter(made, "blocks_taken") - before == 32 + 4)
