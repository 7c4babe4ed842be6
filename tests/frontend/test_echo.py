"""A prompt that was a text is echoed as it was given, whatever its tokens would read."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from frontend.api.completions import prepare
from frontend.client import Model
from frontend.tokenizer import Tokenizer
from frontend.validation import CompletionBody, parse
from tests.frontend.asking import complete
from tests.frontend.fakes import MODEL
from tests.frontend.tokenizer_samples import a_bundle, byte_level_backend, fallback_backend

TOKENIZERS = {
    "byte level": Tokenizer.from_bundle(a_bundle(byte_level_backend(), tokenizer_config__json={"bos_token": "<s>"})),
    "byte fallback": Tokenizer.from_bundle(a_bundle(fallback_backend())),
}


def echoes(kind: str, **fields: Any) -> list[str]:
    info = msgspec.structs.replace(MODEL, vocab_size=TOKENIZERS[kind].vocab_size)
    body = parse(msgspec.json.encode({"echo": True, "max_tokens": 1, **fields}), CompletionBody)
    return prepare(Model(info, TOKENIZERS[kind]), body, "")[1]


@pytest.mark.parametrize(
    ("kind", "prompts"),
    [("byte level", ["<s>hello</s>", "<tool> é"]), ("byte fallback", [" a", "aa  ", "é"])],
)
def test_special_tokens_and_spaces_of_a_text_stay(kind: str, prompts: list[str]) -> None:
    assert echoes(kind, prompt=prompts) == prompts
    assert echoes(kind, prompt=prompts[0], add_special_tokens=False) == prompts[:1]


def test_token_ids_are_echoed_as_the_output_is_written() -> None:
    ids = TOKENIZERS["byte level"].encode_batch(["hello</s>"])[0]
    assert echoes("byte level", prompt=[ids, ids]) == ["hello", "hello"]
    assert echoes("byte level", prompt=ids, skip_special_tokens=False) == ["<s>hello</s>"]


def test_an_echo_that_is_null_is_none(tmp_path) -> None:
    assert complete(tmp_path, max_tokens=2, echo=None).json()["choices"][0]["text"] == "ab"
