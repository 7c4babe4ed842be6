"""Clients that leave at any moment leave nothing behind."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from tests.e2e.stack import eventually, stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


async def leave_at_random(url: str, clients: int) -> int:
    """Streams that are left after a random time, seeded; returns how many had not ended."""
    rng = random.Random(7)
    left = 0

    async def one(http: httpx.AsyncClient, i: int, patience: float) -> None:
        nonlocal left
        body = {"prompt": f"client {i % 20} " * (i % 40 + 1), "max_tokens": 3000, "ignore_eos": True, "stream": i % 3 > 0, "n": 1 + i % 2}
        try:
            async with asyncio.timeout(patience):
                await http.post(f"{url}/v1/completions", json=body)
        except TimeoutError:
            left += 1

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits) as http:
        await asyncio.gather(*(one(http, i, rng.uniform(0.01, 3.0)) for i in range(clients)))
    return left


def test_two_hundred_clients_that_leave_at_random_leave_no_block_in_use() -> None:
    with stack() as made:
        made.up("--runner", "oracle", "--max-num-seqs", "32", "--max-model-len", "4096")
        assert asyncio.run(leave_at_random(made.url, 200)) > 150

        def at_rest() -> bool:
            used = [value for name, value in made.metrics().items() if name.startswith("pagewire_blocks{") and 'state="used"' in name]
            idle = httpx.get(f"{made.url}/load", timeout=60).json() == {"server_load": 0}
            return idle and bool(used) and not any(used)  # without figures nothing is known

        eventually(at_rest)
        answer = httpx.post(f"{made.url}/v1/completions", json={"prompt": "and now?", "max_tokens": 3, "ignore_eos": True}, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 3
