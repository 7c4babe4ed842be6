"""How much text one token can stand for: a text far longer than a context is refused before it is tokenized."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import tokenizers
from tokenizers import decoders, models

NFC_SHRINKS = 4  # Unicode composes at most four characters to one
_CUTS = ("ByteLevel", "Metaspace", "Digits")  # pre-tokenizers that keep every character


def most_characters(backend: tokenizers.Tokenizer, tokens: Collection[str]) -> int:
    """Characters of a text that one token stands for at most; 0 if no bound is known.

    A character of a token stands for a character of the text or, in byte-level BPE, for one of its bytes. That is a bound
    where no step in front of the model drops text, and the model makes of every character one token or several. `tokens`:
    all strings of the vocabulary.
    """
    model, shrinks = backend.model, _shrinks(_steps(backend.normalizer, "normalizers"))
    complete = isinstance(model, models.BPE) and (
        isinstance(backend.decoder, decoders.ByteLevel)
        or (model.byte_fallback and "<0x00>" in tokens)
        or (model.unk_token is not None and not model.fuse_unk)
    )
    keeps = all(_keeps(step) for step in _steps(backend.pre_tokenizer, "pretokenizers"))
    swallow = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())  # the spaces beside them
    return max(map(len, tokens), default=0) * shrinks if complete and keeps and not swallow else 0


def _steps(part: Any, many: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as tokenizer.json has it, a sequence by its steps."""
    if part is None:
        return []
    spec = json.loads(part.__getstate__())
    steps: list[dict[str, Any]] = spec[many] if spec["type"] == "Sequence" else [spec]
    return steps


def _shrinks(normalizers: list[dict[str, Any]]) -> int:
    """How many characters become one at most; 0 if there is no bound."""
    factor = 1
    for step in normalizers:
        match step:
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if len(new) >= len(old):
                pass
            case {"type": "NFC"}:
                factor *= NFC_SHRINKS
            case _:
                return 0
    return factor


def _keeps(cut: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer keeps every character."""
    return cut["type"] in _CUTS or (cut["type"] in ("Split", "Punctuation") and cut["behavior"] != "Removed")
