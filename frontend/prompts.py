"""What a prompt may be in the offline API: a text, token ids, or vLLM's dictionaries of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids; `prompt` is its text, which is told again in the output and not encoded."""

    prompt_token_ids: Sequence[int]
    prompt: str


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
FORMS = "a text, a list of token ids, or a dictionary with 'prompt' or 'prompt_token_ids'"


def each(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """The prompts of a call that takes one or several. Raises ValueError for what is neither."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not _is_list(prompts):
        raise ValueError(f"prompts: {FORMS}, or a list of these, not {type(prompts).__name__}")
    return [prompts] if prompts and isinstance(prompts[0], int) else list(prompts)


def parts(prompt: Prompt, name: str) -> tuple[str | None, Sequence[int] | None]:
    """A prompt's text and its token ids; None of the one that it does not have.

    Whether the ids are the model's is not looked at. Raises ValueError, which calls the prompt `name`.
    """
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        given = {key: value for key, value in prompt.items() if value is not None}
        if unknown := given.keys() - {"prompt", "prompt_token_ids"}:
            raise ValueError(f"{name}: {min(unknown, key=str)!r} is not supported in a prompt's dictionary")
        text, ids = given.get("prompt"), given.get("prompt_token_ids")
        if (text is not None or ids is not None) and isinstance(text, str | None) and (ids is None or _is_list(ids)):
            return text, ids  # type: ignore[return-value]
        raise ValueError(f"{name}: a dictionary needs a text as 'prompt' or a list of token ids as 'prompt_token_ids'")
    if not _is_list(prompt):
        raise ValueError(f"{name}: {FORMS}, not {type(prompt).__name__}")
    return None, prompt


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
