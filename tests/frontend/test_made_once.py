"""What the prompts and choices of one body have in common is made once, however many there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from frontend.stops import StopAutomaton
from frontend.tokenizer import Tokenizer
from frontend.validation import MAX_STOP_LENGTH, MAX_STOPS_LENGTH
from protocol.messages import Submit
from tests.frontend.asking import chat, complete, error
from tests.frontend.fakes import MODEL, Engine

Ask = Callable[..., Any]


def calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of `owner.name` from now on."""
    made: list[tuple[Any, ...]] = []
    original = getattr(owner, name)

    def noting(*args: Any, **more: Any) -> Any:
        made.append(args)
        return original(*args, **more)

    monkeypatch.setattr(owner, name, noting)
    return made


@pytest.mark.parametrize("ask", [complete, chat])
def test_choices_share_the_automaton_of_their_stop_strings(ask: Ask, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = calls(monkeypatch, StopAutomaton, "__init__")
    answer = ask(tmp_path, n=5, max_tokens=3, stop=["a stop", "another"]).json()
    assert len(answer["choices"]) == 5
    assert len(built) == 1


def test_stop_strings_are_bounded_together(tmp_path) -> None:
    stops = ["x" * MAX_STOP_LENGTH] * (MAX_STOPS_LENGTH // MAX_STOP_LENGTH)
    assert complete(tmp_path, stop=stops).status_code == 200
    refusal = error(complete(tmp_path, stop=[*stops, "y"]), 400, "stop")
    assert str(MAX_STOPS_LENGTH) in refusal["message"]


def test_prompts_share_what_their_body_says(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    encoded = calls(monkeypatch, Tokenizer, "encode_batch")
    built = calls(monkeypatch, StopAutomaton, "__init__")
    body = {"prompt": [[65], [66, 67], [68]], "bad_words": ["word"], "logit_bias": {"3": 1.0}, "stop": "a stop"}
    assert complete(tmp_path, engine, **body).status_code == 200
    assert [args[1] for args in encoded] == [["word", " word"]]
    assert len(built) == 1
    first, *others = [message.params for message in engine.messages if isinstance(message, Submit)]
    assert others == [first] * 2


def test_each_prompt_has_room_of_its_own(tmp_path) -> None:
    engine = Engine()
    prompts = [[65] * (MODEL.max_model_len - left) for left in (5, 20)]
    assert complete(tmp_path, engine, prompt=prompts).status_code == 200
    assert [message.params.max_tokens for message in engine.messages if isinstance(message, Submit)] == [5, 16]
    error(complete(tmp_path, prompt=prompts, min_tokens=6), 400, "min_tokens")
