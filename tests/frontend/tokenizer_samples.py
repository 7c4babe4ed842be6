"""Small tokenizers, one for each kind of decoder, and the bundles that hold them."""

from __future__ import annotations

import json

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from frontend.vocabulary import byte_level_alphabet

BYTE_CHARACTERS = {byte: character for character, byte in byte_level_alphabet().items()}


def byte_level_backend() -> Tokenizer:
    """256 byte tokens, a few merges, a BOS put in front and two special tokens."""
    vocab = {BYTE_CHARACTERS[byte]: byte for byte in range(256)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ã", "©"), ("ð", "Ł")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("two words", normalized=False)])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)])
    return backend


def metaspace_backend() -> Tokenizer:
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁▁": 5, "ab": 6, "<0x41>": 7}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "▁"), ("a", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def fallback_backend(strip: bool = True) -> Tokenizer:
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257, "a": 258, "▁a": 259, "▁▁": 260, "é": 261}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return backend


def wordpiece_backend() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(["[UNK]", "[SEP]", "play", "##ing", "##ed", "we", ",", "like", "."])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    return backend


BACKENDS = {
    "byte level": byte_level_backend,
    "metaspace": metaspace_backend,
    "byte fallback": fallback_backend,
    "byte fallback, no strip": lambda: fallback_backend(strip=False),
    "wordpiece": wordpiece_backend,
}


def a_bundle(backend: Tokenizer, **files: object) -> bytes:
    """A bundle with this tokenizer.json; other files are given as `name__ext=value` and written as JSON unless text."""
    entries = {"tokenizer.json": backend.to_str().encode()}
    for name, value in files.items():
        entries[name.replace("__", ".")] = (value if isinstance(value, str) else json.dumps(value)).encode()
    return msgspec.msgpack.encode(entries)
