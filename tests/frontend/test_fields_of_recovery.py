"""The requests that recovery is tried with (`tests/e2e/test_every_field.py`) have every field: a new one is not to be forgotten there."""

from __future__ import annotations

import msgspec

from frontend.validation import ChatBody, CompletionBody, Sampling
from tests.e2e.test_every_field import CHAT, STREAMED, WHOLE

WITHOUT_EFFECT = {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
REFUSED = {"suffix", "tools", "tool_choice", "response_format", "reasoning_effort", "modalities"}  # unless they ask for nothing
OTHERWISE = {"max_completion_tokens", "add_generation_prompt", "chat_template_kwargs"}  # other words for what is there, or of the template


def fields(body: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(body)} - {"model"} - WITHOUT_EFFECT - REFUSED - OTHERWISE


def test_every_field_of_completions_is_in_one_of_them() -> None:
    assert fields(CompletionBody) == WHOLE.keys() | STREAMED.keys()


def test_every_sampling_field_is_in_the_conversation() -> None:
    assert fields(ChatBody) - CHAT.keys() == {"stream", "stream_options"}
    assert fields(Sampling) - CHAT.keys() == {"stream", "stream_options"}
