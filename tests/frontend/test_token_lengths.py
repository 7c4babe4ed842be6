"""A text that no tokenizing would fit into the context is refused before it is tokenized, and no other text is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from frontend.client import Model
from frontend.offline import SamplingParams, prepare
from frontend.tokenizer import Tokenizer
from frontend.validation import MAX_TOKENIZED
from protocol.tokenizer_files import byte_bundle
from tests.frontend.asking import error, post, serve
from tests.frontend.fakes import MODEL, Engine, LocalClient
from tests.frontend.tokenizer_samples import BACKENDS, a_bundle, byte_level_backend, fallback_backend, metaspace_backend

LONG = "a" * 513  # the fakes' context has 512 tokens, and each of their tokens is a byte


def composing_backend() -> Backend:
    backend = byte_level_backend()
    backend.normalizer = normalizers.NFC()
    return backend


BOUNDED = {
    "bytes": byte_bundle(),
    **{name: a_bundle(BACKENDS[name]()) for name in ("byte level", "metaspace", "byte fallback", "byte fallback, no strip")},
    "composing": a_bundle(composing_backend()),
}
TEXT = st.text(st.sampled_from("ahelw o▁ \n漢é🎉\u0301\u03b1\u0313\u0300\u0345<s>")) | st.text()


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(TEXT | st.sampled_from(["hell", "two words", "<tool>", "\u03b1\u0313\u0300\u0345"]), max_size=20))
def test_no_text_has_fewer_tokens_than_its_bound(name: str, pieces: list[str]) -> None:
    tokenizer = Tokenizer.from_bundle(BOUNDED[name])
    assert tokenizer.most_characters > 0
    text = "".join(pieces)
    (ids,) = tokenizer.encode_batch([text], add_special_tokens=False)
    assert len(ids) >= tokenizer.least_tokens(text)


def test_the_bound_is_the_longest_token() -> None:
    tokenizer = Tokenizer.from_bundle(BOUNDED["byte level"])
    assert tokenizer.least_tokens("two words" * 100) == len(tokenizer.encode_batch(["two words" * 100], False)[0]) == 100
    assert Tokenizer.from_bundle(BOUNDED["bytes"]).least_tokens("é" * 7) == 7


def changed(change: Callable[[Backend], Any], backend: Callable[[], Backend] = byte_level_backend) -> Backend:
    made = backend()
    change(made)
    return made


UNBOUNDED = {
    "unknown words are one token": BACKENDS["wordpiece"](),
    "unknown characters are fused": changed(lambda b: setattr(b.model, "fuse_unk", True), metaspace_backend),
    "bytes to fall back to are missing": changed(
        lambda b: setattr(b.model, "byte_fallback", True), lambda: changed(lambda b: setattr(b.model, "fuse_unk", True), metaspace_backend)
    ),
    "a normalizer strips": changed(lambda b: setattr(b, "normalizer", normalizers.Strip())),
    "a pattern is replaced": changed(lambda b: setattr(b, "normalizer", normalizers.Replace(Regex(" +"), " "))),
    "a longer text is replaced": changed(lambda b: setattr(b, "normalizer", normalizers.Replace("aa", "a"))),
    "spaces are removed": changed(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.WhitespaceSplit())),
    "what is split at is removed": changed(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Split(" ", "removed"))),
    "a token swallows the spaces beside it": changed(lambda b: b.add_tokens([AddedToken("<end>", rstrip=True)]), fallback_backend),
}


@pytest.mark.parametrize("why", UNBOUNDED)
def test_there_is_no_bound_where_text_may_vanish(why: str) -> None:
    tokenizer = Tokenizer.from_bundle(a_bundle(UNBOUNDED[why]))
    assert tokenizer.most_characters == tokenizer.least_tokens("x" * 10**6) == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": ["short", LONG]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("/generate", {"prompt": LONG}, "prompt"),
    ],
)
def test_a_far_too_long_text_is_refused_untokenized(
    path: str, body: dict[str, Any], param: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode_batch

    def short_only(self: Tokenizer, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        assert max(map(len, texts)) < len(LONG)
        return encode(self, texts, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode_batch", short_only)
    engine = Engine()
    refusal = error(post(path, body, tmp_path, engine), 400, param)
    assert refusal["code"] == "context_length_exceeded"
    assert refusal["message"].startswith("this model's context has 512 tokens; the ")
    assert f"characters of {param} make at least" in refusal["message"]
    assert not engine.live, "nothing may reach the scheduler"


def test_the_offline_api_refuses_it_too() -> None:
    model = Model(MODEL, Tokenizer.from_bundle(BOUNDED["bytes"]))
    with pytest.raises(ValueError, match="513 characters of prompt make at least 513"):
        prepare(model, LONG, SamplingParams(), False)


def test_what_just_fits_is_tokenized(tmp_path) -> None:
    assert post("/v1/completions", {"prompt": LONG[:511], "max_tokens": 1}, tmp_path).status_code == 200
    refusal = error(post("/v1/completions", {"prompt": LONG[:512], "max_tokens": 1}, tmp_path), 400, "prompt")
    assert "512 of the prompt" in refusal["message"]


def test_a_long_text_can_still_be_counted(tmp_path) -> None:
    assert post("/tokenize", {"prompt": LONG}, tmp_path).json()["count"] == len(LONG)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "a" * (MAX_TOKENIZED + 1)}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * MAX_TOKENIZED}]}, "messages"),
        ("/detokenize", {"tokens": [1] * (MAX_TOKENIZED + 1)}, "tokens"),
    ],
)
def test_but_not_one_without_end(path: str, body: dict[str, Any], param: str, tmp_path) -> None:
    error(post(path, body, tmp_path), 400, param)


def test_counting_holds_up_no_prompt(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, counting, answered = Tokenizer.encode_batch, threading.Event(), threading.Event()

    def slow(self: Tokenizer, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        if texts == ["slow"]:
            counting.set()
            assert answered.wait(60)
        return encode(self, texts, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode_batch", slow)

    async def scenario(http: httpx.AsyncClient, client: LocalClient) -> None:
        try:
            counts = [asyncio.create_task(http.post("/tokenize", json={"prompt": "slow"})) for _ in range(4)]
            while not counting.is_set():
                await asyncio.sleep(0.001)
            answer = await asyncio.wait_for(http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1}), 30)
            assert answer.status_code == 200
        finally:
            answered.set()
        assert [answer.json()["count"] for answer in await asyncio.gather(*counts)] == [4] * 4

    serve(scenario, tmp_path)
