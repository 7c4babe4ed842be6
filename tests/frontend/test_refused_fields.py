"""What is not there yet is refused with a 400 that names the field, and an endpoint that is not there with OpenAI's 404."""

from __future__ import annotations

from typing import Any

import pytest

from tests.frontend.asking import chat, complete, error, post, submitted
from tests.frontend.fakes import Engine

SCHEMA = {"type": "object"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
STRUCTURED: list[tuple[str, Any]] = [
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}),
    ("guided_json", SCHEMA),
    ("guided_regex", "a+"),
    ("guided_choice", ["a", "b"]),
    ("guided_grammar", "root ::= 'x'"),
    ("structured_outputs", {"json": SCHEMA}),
]
TALK_ONLY: list[tuple[str, Any]] = [
    ("tools", [TOOL]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("functions", [TOOL["function"]]),
    ("function_call", "auto"),
    ("reasoning_effort", "low"),
    ("include_reasoning", True),
    ("reasoning", {"effort": "low"}),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "x", "format": "wav"}),
]


@pytest.mark.parametrize(("field", "value"), STRUCTURED + TALK_ONLY)
@pytest.mark.parametrize("ask", [complete, chat])
def test_a_field_of_a_later_issue_is_refused_by_name(ask: Any, field: str, value: Any, tmp_path) -> None:
    engine = Engine()
    body = error(ask(tmp_path, engine, **{field: value}), 400, field)
    assert field in body["message"]
    assert body["code"] in ("unsupported_parameter", "unknown_parameter")
    assert not engine.live, "nothing may reach the scheduler"


@pytest.mark.parametrize(
    "harmless",
    [{"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"response_format": {"type": "text"}}, {"modalities": ["text"]}],
)
def test_what_asks_for_nothing_is_no_reason_to_refuse(harmless: dict[str, Any], tmp_path) -> None:
    assert chat(tmp_path, **harmless).status_code == 200


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/v1/audio/speech", "/v1/moderations", "/v1"])
def test_an_endpoint_that_is_not_there_answers_openais_404(path: str, tmp_path) -> None:
    body = error(post(path, {"model": "oracle", "input": "x"}, tmp_path), 404, None)
    assert path in body["message"]
    assert (body["type"], body["code"]) == ("invalid_request_error", "not_found")


class TestConversations:
    """What of a conversation becomes the prompt."""

    TALK = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"})

    def prompt(self, tmp_path, **fields: Any) -> str:
        engine = Engine()
        assert chat(tmp_path, engine, **fields).status_code == 200
        return submitted(engine).prompt[::4].decode()

    def test_the_generation_prompt_comes_unless_it_is_not_wanted(self, tmp_path) -> None:
        assert self.prompt(tmp_path) == "user: hi\nassistant: "
        assert self.prompt(tmp_path, add_generation_prompt=False) == "user: hi\n"

    def test_the_final_message_goes_on(self, tmp_path) -> None:
        assert self.prompt(tmp_path, messages=list(self.TALK), continue_final_message=True).endswith("assistant: I am")
        assert self.prompt(tmp_path, messages=list(self.TALK)).endswith("assistant: I am\nassistant: ")

    def test_both_contradict(self, tmp_path) -> None:
        answer = chat(tmp_path, messages=list(self.TALK), continue_final_message=True, add_generation_prompt=True)
        error(answer, 400, "continue_final_message")

    def test_the_template_is_given_the_clients_arguments(self, tmp_path) -> None:
        assert self.prompt(tmp_path, chat_template_kwargs={"anything": 1}) == "user: hi\nassistant: "
        error(chat(tmp_path, chat_template_kwargs={"messages": []}), 400, "chat_template_kwargs")

    @pytest.mark.parametrize("name", ["add_generation_prompt", "continue_final_message"])
    def test_what_has_a_field_of_its_own_is_no_argument(self, name: str, tmp_path) -> None:
        refusal = error(chat(tmp_path, chat_template_kwargs={name: True}), 400, "chat_template_kwargs")
        assert name in refusal["message"]
        body = {"messages": list(self.TALK), "chat_template_kwargs": {name: False}}
        error(post("/tokenize", body, tmp_path), 400, "chat_template_kwargs")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_than_the_context_holds_is_refused_in_the_name_that_it_was_asked_in(field: str, tmp_path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, field: 100_000}
    assert error(post("/v1/chat/completions", body, tmp_path), 400, field)["code"] == "context_length_exceeded"
