"""Workers of two models behind one scheduler, as real processes: the name in a request decides who answers."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.e2e.stack import Clients, eventually, mixed_bodies, stack

pytestmark = pytest.mark.slow

LETTERS = re.compile(r"[a-z ]*")  # the simulated runner says nothing else; the oracle does at once


def test_two_models_behind_one_scheduler_answer_under_their_own_names() -> None:
    with stack() as made:
        made.up("--runner", "oracle")
        made.start("worker", "--runner", "simulated", "--name", "worker-letters")

        def names() -> set[str]:
            return {model["id"] for model in httpx.get(f"{made.url}/v1/models", timeout=60).json()["data"]}

        eventually(lambda: names() == {"oracle", "simulated"})
        clients = Clients(made.url, [{**body, "model": "oracle"} for body in mixed_bodies(6, max_tokens=60)])
        for i in range(6):
            body = {"model": "simulated", "prompt": f"request {i}", "max_tokens": 60, "seed": i}
            answer = httpx.post(f"{made.url}/v1/completions", json=body, timeout=60).json()
            assert answer["model"] == "simulated"
            [choice] = answer["choices"]
            assert len(choice["text"]) == 60
            assert LETTERS.fullmatch(choice["text"])
        clients.finish()  # every byte is the oracle's
        assert not LETTERS.fullmatch("".join("".join(seen.texts.values()) for seen in clients.seen if seen is not None))
        refused = httpx.post(f"{made.url}/v1/completions", json={"model": "neither", "prompt": "x"}, timeout=60)
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "model_not_found"
