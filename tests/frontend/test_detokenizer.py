"""Text appears token by token: whole characters only, all of them, and equal to decoding everything at once."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from frontend.detokenizer import TextStream
from frontend.tokenizer import Tokenizer
from protocol.tokenizer_files import byte_bundle
from tests.frontend.tokenizer_samples import BACKENDS, a_bundle, byte_level_backend, fallback_backend, metaspace_backend, wordpiece_backend


@pytest.fixture(scope="module")
def of_bytes() -> Tokenizer:
    return Tokenizer.from_bundle(byte_bundle())


def pushed(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_pieces_add_up_to_the_whole(name: str, data: st.DataObject) -> None:
    backend = BACKENDS[name]()
    tokenizer = Tokenizer.from_bundle(a_bundle(backend))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=16))
    skip = data.draw(st.booleans())
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    pieces = pushed(stream, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert stream.text_length == len("".join(pieces))
    theirs = backend.decode(ids, skip_special_tokens=skip)
    if "byte fallback" not in name or "\ufffd" not in theirs:
        assert "".join(pieces) == theirs


def test_half_a_character_is_never_shown(of_bytes: Tokenizer) -> None:
    stream = TextStream(of_bytes)
    assert [stream.push(byte) for byte in "é🎉".encode()] == ["", "é", "", "", "", "🎉"]
    assert stream.flush() == ""


def test_a_character_that_never_ends_becomes_a_replacement_at_the_end(of_bytes: Tokenizer) -> None:
    assert pushed(TextStream(of_bytes), [0x61, 0xF0, 0x9F, 0x8E]) == ["a", "", "", "", "\ufffd"]


def test_invalid_bytes_are_replaced_as_soon_as_they_are_known_to_be(of_bytes: Tokenizer) -> None:
    assert pushed(TextStream(of_bytes), [0xFF, 0xC3, 0x28, 0xE2, 0x82, 0x41]) == ["\ufffd", "", "\ufffd(", "", "", "\ufffdA", ""]


@given(st.lists(st.integers(0, 255), max_size=20))
def test_broken_utf8_equals_decoding_it_at_once(of_bytes: Tokenizer, ids: list[int]) -> None:
    assert "".join(pushed(TextStream(of_bytes), ids)) == bytes(ids).decode(errors="replace")


def test_tokens_that_split_characters_wait_for_each_other() -> None:
    backend = byte_level_backend()
    tokenizer = Tokenizer.from_bundle(a_bundle(backend))
    (ids,) = tokenizer.encode_batch(["x🎉y"], add_special_tokens=False)
    assert len(ids) == 5  # the first two bytes of the character are one token
    assert pushed(TextStream(tokenizer), ids) == ["x", "", "", "🎉", "y", ""]


def test_special_tokens_do_not_break_a_character_open() -> None:
    tokenizer = Tokenizer.from_bundle(byte_bundle())
    assert pushed(TextStream(tokenizer), [0xC3, 256, 0xA9]) == ["", "", "é", ""]
    assert pushed(TextStream(tokenizer, skip_special_tokens=False), [0xC3, 256, 0xA9]) == ["", "\ufffd<eos>", "\ufffd", ""]


def test_a_text_of_its_own_begins_without_the_space_of_its_first_token() -> None:
    tokenizer = Tokenizer.from_bundle(a_bundle(fallback_backend()))
    assert pushed(TextStream(tokenizer), [259, 259]) == ["a", " a", ""]


def test_a_text_that_continues_a_prompt_keeps_it() -> None:
    for backend, token in ((fallback_backend(), 259), (metaspace_backend(), 4)):
        tokenizer = Tokenizer.from_bundle(a_bundle(backend))
        assert pushed(TextStream(tokenizer, continues=True), [token, token]) == [" a", " a", ""]


def test_a_byte_token_completes_a_character_beside_ordinary_ones() -> None:
    tokenizer = Tokenizer.from_bundle(a_bundle(fallback_backend()))
    assert pushed(TextStream(tokenizer), [258, 0xC3 + 1, 0xA9 + 1, 258]) == ["a", "", "é", "a", ""]


def test_one_broken_byte_does_not_spoil_the_bytes_beside_it() -> None:
    tokenizer = Tokenizer.from_bundle(a_bundle(fallback_backend()))
    assert pushed(TextStream(tokenizer), [0xC3 + 1, 0xA9 + 1, 0xFF + 1, 258]) == ["", "é", "\ufffd", "a", ""]


def test_decoders_that_are_not_known_go_through_the_library() -> None:
    tokenizer = Tokenizer.from_bundle(a_bundle(wordpiece_backend()))
    assert pushed(TextStream(tokenizer), [5, 7, 2, 3, 6, 1, 2, 4, 8]) == ["we", " like", " play", "ing", ",", "", " play", "ed", ".", ""]


def test_a_long_text_through_the_library_costs_a_window_a_token_not_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = wordpiece_backend()
    tokenizer = Tokenizer.from_bundle(a_bundle(backend))
    lengths: list[int] = []
    decode = tokenizer._batch_decode
    assert decode is not None
    monkeypatch.setattr(tokenizer, "_batch_decode", lambda ids, skip: lengths.append(len(ids)) or decode(ids, skip))
    pushed(TextStream(tokenizer), [5, 7, 2, 3] * 200)
    assert max(lengths) < 6


def test_a_decoder_with_a_rule_for_the_last_token_adds_up_too() -> None:
    backend = Backend(models.BPE({"a</w>": 0, "b": 1, "c</w>": 2}, []))
    backend.decoder = decoders.BPEDecoder()
    tokenizer = Tokenizer.from_bundle(msgspec.msgpack.encode({"tokenizer.json": json.dumps(json.loads(backend.to_str())).encode()}))
    assert "".join(pushed(TextStream(tokenizer), [0, 1, 2, 0])) == backend.decode([0, 1, 2, 0]) == "a bc a"
