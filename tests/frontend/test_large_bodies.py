"""What is large, of what comes and what goes, holds up nobody: it is refused before it is made, or made beside the event loop."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest

from frontend import validation
from frontend.api.answers import Answer
from frontend.api.handling import MAX_AT_ONCE
from frontend.errors import ApiError
from frontend.validation import MAX_VALUES, ChatBody, CompletionBody, parse
from tests.frontend.asking import chat, complete, error, post

MANY = MAX_VALUES + 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [%b]}' % b",".join([b"[1]"] * MANY),
        b'{"prompt": [%b]}' % b",".join([b'""'] * MANY),
        b'{"messages": [%b]}' % b",".join([b"{}"] * MANY),
        b'{"prompt": %b' % (b"[" * MANY),
        b'{"prompt": [1], "logit_bias": {%b}}' % b",".join(b'"%d":1' % i for i in range(MANY)),
        b'{"prompt": "\\"", "stop": [%b]}' % b",".join([b'"\\\\"'] * MANY),
    ],
)
def test_too_many_values_are_refused_before_any_is_made(body: bytes, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_decoder", None)  # must not be called
    refusal = error(post("/v1/completions", body, tmp_path), 413, None)
    assert refusal["code"] == "body_too_large"


@pytest.mark.parametrize(
    "text",
    ['{"a": [1]}, ' * MAX_VALUES, "\\" * MANY + '"' * MANY, "[" * MANY + "\\"],
)
def test_what_stands_in_a_text_is_no_value(text: str) -> None:
    assert parse(msgspec.json.encode({"prompt": text}), CompletionBody).prompt == text


def test_numbers_are_not_counted() -> None:
    ids = [7] * MANY
    assert parse(msgspec.json.encode({"prompt": ids}), CompletionBody).prompt == ids


def test_numbers_of_template_arguments_are_read_by_python() -> None:
    """The decoder takes 8 µs for some of them: one body could hold up the event loop for seconds."""
    numbers = ["1.2345678901234567890123e-300", "-0.5", "2e3", "7"]
    body = b'{"messages": [{"role": "user"}], "chat_template_kwargs": {"numbers": [%b]}}'
    read = parse(body % ",".join(numbers).encode(), ChatBody).chat_template_kwargs
    assert read == {"numbers": [float(number) for number in numbers]}
    assert validation._decoder(ChatBody).float_hook is validation._finite


@pytest.mark.parametrize("end", [b"", b"\\"])
def test_a_text_without_an_end_is_no_json(end: bytes) -> None:
    with pytest.raises(ApiError, match="no JSON"):
        parse(b'{"messages": "' + b"[" * MANY + end, ChatBody)


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that have written an answer in one piece."""
    names: list[str] = []
    whole = Answer.whole

    def noting(answer: Answer) -> dict[str, Any]:
        names.append(threading.current_thread().name)
        return whole(answer)

    monkeypatch.setattr(Answer, "whole", noting)
    return names


def test_a_long_answer_is_written_beside_the_event_loop(tmp_path, writers: list[str]) -> None:
    tokens = MAX_AT_ONCE // 3 + 1
    body = complete(tmp_path, max_tokens=tokens, logprobs=2).json()
    assert len(body["choices"][0]["logprobs"]["tokens"]) == tokens
    assert len(writers) == 1
    assert writers[0] != threading.main_thread().name


def test_log_probabilities_of_a_prompt_count_for_each_choice(tmp_path, writers: list[str]) -> None:
    prompt = [65] * (MAX_AT_ONCE // 4 + 2)  # the first has none
    assert complete(tmp_path, prompt=prompt, prompt_logprobs=1, n=2, max_tokens=1).status_code == 200
    assert len(writers) == 1
    assert writers[0] != threading.main_thread().name


def test_a_short_answer_does_not_go_by_way_of_a_thread(tmp_path, writers: list[str]) -> None:
    assert complete(tmp_path, max_tokens=300).status_code == 200
    assert chat(tmp_path, max_tokens=20, logprobs=True, top_logprobs=2).status_code == 200
    assert writers == [threading.main_thread().name] * 2


def test_the_refusal_of_a_long_answer_is_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(answer: Answer) -> dict[str, Any]:
        raise ApiError(503, "moved", code="moved")

    monkeypatch.setattr(Answer, "whole", refuse)
    assert error(complete(tmp_path, max_tokens=500, logprobs=2), 503, None)["code"] == "moved"


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_that_no_float_holds_is_refused_where_fields_have_no_type(number: str, tmp_path) -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"a": %b}}' % number.encode()
    assert error(post("/v1/chat/completions", body, tmp_path), 400, "chat_template_kwargs")["code"] == "invalid_value"
