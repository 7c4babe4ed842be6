"""A request with every sampling field set is killed in the middle and resumed; its answer is the undisturbed one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from gpu_worker.oracle import expected_prompt_logprobs
from tests.e2e.stack import Stack, eventually, stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EVERY: dict[str, Any] = {
    "prompt": "The keeper of the lighthouse counted the ships, and every evening he wrote their number into a book. " * 2,
    "max_tokens": 100,
    "n": 2,
    "temperature": 0.8,
    "top_p": 0.97,
    "top_k": 60,
    "min_p": 0.001,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "repetition_penalty": 1.1,
    "seed": 11,
    "min_tokens": 90,
    "ignore_eos": False,
    "stop": ["never to be found"],
    "stop_token_ids": [33],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "logit_bias": {"97": 1.5, "98": -2.0},
    "allowed_token_ids": list(range(32, 250)),
    "bad_words": ["xyz", "q"],
    "logprobs": 4,
    "echo": True,
    "return_token_ids": True,
    "add_special_tokens": True,
    "priority": 1,
    "queue_timeout": 600.0,
    "cache_salt": "salt",
    "user": "somebody",
}
WHOLE = EVERY | {"best_of": 3, "prompt_logprobs": 2}
STREAMED = EVERY | {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
# ids of the packaged model's common words instead of bytes
REAL = {
    "allowed_token_ids": list(range(17, 4000)),
    "stop_token_ids": [9000],
    "logit_bias": {"260": 1.5, "284": -2.0},
    "bad_words": [" sea"],
}
TALK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me about the sea."}, {"role": "assistant", "content": "The sea is"}],
    "continue_final_message": True,
    "logprobs": True,
    "top_logprobs": 3,
    "prompt_logprobs": 1,
}
CHAT = {name: value for name, value in EVERY.items() if name not in {"prompt", "echo", "logprobs", "add_special_tokens"}} | TALK


def whole(made: Stack, path: str, body: dict[str, Any]) -> Any:
    """The answer in one piece, without what differs from request to request."""
    answer = httpx.post(made.url + path, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return {key: value for key, value in answer.json().items() if key not in ("id", "created")}


def streamed(made: Stack, path: str, body: dict[str, Any]) -> Any:
    """A stream, its events put together: a recovery may send several tokens in one, where there were several."""
    choices: dict[int, dict[str, Any]] = {}
    last: dict[str, Any] = {}
    with httpx.stream("POST", made.url + path, json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            last = event["usage"]
            for piece in event["choices"]:
                choice = choices.setdefault(piece["index"], {"text": "", "token_ids": [], "logprobs": {}, "reasons": []})
                choice["text"] += piece["text"]
                choice["token_ids"] += piece.get("token_ids", [])
                for column, values in (piece["logprobs"] or {}).items():
                    choice["logprobs"].setdefault(column, []).extend(values)
                choice["reasons"] += [piece["finish_reason"]] if piece["finish_reason"] else []
    return choices, last


def disturbed(made: Stack, ask: Callable[[], Any], role: str, after: float) -> Any:
    """What is answered when a service is killed in the middle of it. If the answer was there before the fault it is asked anew."""
    for _ in range(5):
        answers: list[Any] = []
        thread = threading.Thread(target=lambda answers=answers: answers.append(ask()), daemon=True)
        thread.start()
        eventually(lambda thread=thread: httpx.get(made.url + "/load", timeout=60).json()["server_load"] == 1 or not thread.is_alive())
        time.sleep(after)
        pid = made.kill(role)
        hit = thread.is_alive()
        thread.join(150)
        assert made.service(role).pid != pid
        if hit:
            return answers[0]
    raise AssertionError("the answer was there before the fault, each time")


CASES = [(whole, "/v1/completions", WHOLE), (streamed, "/v1/completions", STREAMED), (whole, "/v1/chat/completions", CHAT)]


def test_killed_at_the_oracle() -> None:
    with stack() as made:
        made.up("--runner", "oracle", env={"PAGEWIRE_ORACLE_STEP_TIME": "0.02"})
        for ask, path, body in CASES:
            undisturbed = ask(made, path, body)
            for role in ("worker", "scheduler"):
                assert disturbed(made, lambda: ask(made, path, body), role, 0.5) == undisturbed, (path, role)  # noqa: B023


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_killed_while_the_prompt_is_computed(role: str) -> None:
    """64 tokens a step of 0.1 s: after 0.4 s some positions have been told, and most have not."""
    body = {"prompt": EVERY["prompt"] * 6, "max_tokens": 0, "prompt_logprobs": 3}
    with stack() as made:
        made.up("--runner", "oracle", "--max-num-batched-tokens", "64", env={"PAGEWIRE_ORACLE_STEP_TIME": "0.1"})
        answer = disturbed(made, lambda: whole(made, "/v1/completions", body), role, 0.4)
    first, *told = answer["choices"][0]["prompt_logprobs"]
    owed = expected_prompt_logprobs(list(body["prompt"].encode()), 3)
    assert first is None
    assert [{int(id): item["logprob"] for id, item in one.items()} for one in told] == [dict(reversed(pairs)) for pairs in owed]


@pytest.mark.model
def test_killed_at_the_packaged_model() -> None:
    with stack() as made:
        made.up("--dtype", "float32")
        for (ask, path, body), roles in zip(CASES[1:], (["worker", "scheduler"], ["worker"]), strict=True):
            body = body | REAL | {"min_tokens": 45, "max_tokens": 50}
            undisturbed = ask(made, path, body)
            for role in roles:
                assert disturbed(made, lambda: ask(made, path, body), role, 0.5) == undisturbed, (path, role)  # noqa: B023
