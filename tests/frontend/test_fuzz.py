"""Malformed bodies, by the thousand: the server refuses each in the same shape and answers right afterwards."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from frontend.server import make_app
from tests.frontend.fakes import Engine, LocalClient, settings_for, text

GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "oracle",
        "prompt": "hi",
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "n": 1,
        "stop": ["x"],
        "seed": 1,
        "logprobs": 1,
        "logit_bias": {"1": 1.0},
        "stop_token_ids": [1],
        "stream_options": {"include_usage": True},
        "stream": True,
    },
    "/v1/chat/completions": {
        "model": "oracle",
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}],
        "max_tokens": 2,
        "top_logprobs": 1,
        "logprobs": True,
        "bad_words": ["a"],
        "chat_template_kwargs": {"x": 1},
        "response_format": {"type": "text"},
    },
    "/generate": {"prompt": "hi", "max_tokens": 2, "temperature": 0.5},
}
WRONG = [
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    -1e308,
    2**63,
    -(2**63),
    10**40,
    "",
    "x" * 300,
    "\x00",
    "\u2028",
    [],
    [[]],
    [None],
    {},
    {"": 0},
    [{}],
    [[[1]]],
]


def malformed(rng: random.Random, good: dict[str, Any]) -> bytes:
    """A good body, broken in one of many ways."""
    body = json.loads(json.dumps(good))
    kind = rng.randrange(8)
    key = rng.choice(list(body))
    if kind == 0:
        del body["prompt" if "prompt" in body else "messages"]
    elif kind == 1:
        body[f"{key}{rng.randrange(99)}"] = rng.choice(WRONG)
    elif kind == 2:
        body["prompt" if "prompt" in body else "messages"] = rng.choice([w for w in WRONG if not isinstance(w, str) or not w])
    elif kind in (3, 4):
        body["max_tokens"] = rng.choice([w for w in WRONG if w is not None])
    encoded = json.dumps(body).encode()
    if kind == 5:
        return encoded[: rng.randrange(len(encoded))]
    if kind == 6:
        at = rng.randrange(1, len(encoded))
        return encoded[:at] + bytes(rng.randrange(0xF8, 0x100) for _ in range(rng.randint(1, 4))) + encoded[at:]
    if kind == 7:
        depth = rng.choice([3, 500, 200_000])
        return b'{"prompt":' + b"[" * depth + b"]" * rng.choice([0, depth]) + b"}"
    return encoded


@pytest.mark.slow
def test_malformed_bodies_get_4xx_and_the_next_request_its_answer(tmp_path):
    async def main() -> None:
        client = LocalClient(settings_for(tmp_path), Engine())
        await client.start()
        transport = httpx.ASGITransport(make_app(client), raise_app_exceptions=False)
        rng = random.Random(20)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            for i in range(5000):
                path = rng.choice(list(GOOD))
                body = malformed(rng, GOOD[path])
                response = await http.post(path, content=body)
                assert 400 <= response.status_code < 500, (response.status_code, path, body[:300])
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                if i % 500 == 0:
                    assert (await http.post("/generate", json=GOOD["/generate"])).json()["text"] == text(2)
            for path, good in GOOD.items():
                assert (await http.post(path, json=good)).status_code == 200, path
        assert not client.journal.entries()
        await client.stop()

    asyncio.run(main())
