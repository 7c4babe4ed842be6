"""What each token id stands for: bytes, and text where the bytes are whole characters.

A decoder is usable here if its text is the concatenation of what single tokens stand for, apart from the space in front
of the first one. Byte-level BPE and SentencePiece are of this kind; for others `read_decoder` says None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Piece = Callable[[int], "bytes | None"]  # id → bytes; None: no such id
First = Callable[[bytes], bytes]  # what becomes of the first token's bytes

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(ValueError):
    """Tokenizer files that cannot be used, and why."""


@dataclass(frozen=True)
class TokenDecoder:
    """How one token's string becomes bytes, and what happens at the start of a text."""

    token: Callable[[str], bytes]
    first: First


class Vocabulary:
    """Texts and bytes of ids, worked out when an id first occurs.

    shown, bare: caches id → text, None where an id is not whole characters; `bare` leaves special tokens out.
    """

    def __init__(self, piece: Piece, special: Iterable[int], first: First) -> None:
        self.first = first
        self.shown = Texts(piece, frozenset())
        self.bare = Texts(piece, frozenset(special))


class Texts(dict[int, "str | None"]):
    """Cache id → text; None where the bytes of an id are not whole characters."""

    def __init__(self, piece: Piece, hidden: frozenset[int]) -> None:
        super().__init__()
        self._piece = piece
        self._hidden = hidden

    def __missing__(self, token: int) -> str | None:
        data = self.data(token)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = None
        if data:  # an id that nobody defined is not worth remembering
            self[token] = text
        return text

    def data(self, token: int) -> bytes:
        """The bytes of an id, empty for a hidden or an undefined one."""
        return b"" if token in self._hidden else self._piece(token) or b""


def byte_level_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE (GPT-2): printable Latin-1 stands for itself, the other 68 bytes for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def read_decoder(spec: dict[str, Any] | None) -> TokenDecoder | None:
    """The token decoder for a `decoder` entry of tokenizer.json; None if it does not work token by token."""
    steps = spec["decoders"] if spec and spec["type"] == "Sequence" else [spec] if spec else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenDecoder(_byte_level, _unchanged)
    if kinds in (["Metaspace"], ["ByteFallback", "Metaspace"]):
        mark, fallback = steps[-1]["replacement"], len(kinds) == 2
        first = _unchanged if steps[-1].get("prepend_scheme") == "never" else _without_spaces
        return TokenDecoder(_replacing([(mark, " ")], fallback), first)
    return _read_sentencepiece(steps, kinds)


def _read_sentencepiece(steps: list[dict[str, Any]], kinds: list[str]) -> TokenDecoder | None:
    """Replace …, ByteFallback, Fuse, and perhaps Strip of one leading space."""
    if "Fuse" not in kinds:
        return None
    fuse = kinds.index("Fuse")
    before, behind = steps[:fuse], steps[fuse + 1 :]
    fallback = bool(before) and before[-1]["type"] == "ByteFallback"
    replaces = before[:-1] if fallback else before
    if any(step["type"] != "Replace" or "String" not in step["pattern"] for step in replaces):
        return None
    if behind and (len(behind) > 1 or behind[0] != {"type": "Strip", "content": " ", "start": 1, "stop": 0}):
        return None
    pairs = [(step["pattern"]["String"], step["content"]) for step in replaces]
    return TokenDecoder(_replacing(pairs, fallback), _without_one_space if behind else _unchanged)


def _replacing(pairs: list[tuple[str, str]], byte_fallback: bool) -> Callable[[str], bytes]:
    def decode(token: str) -> bytes:
        if byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in pairs:
            token = token.replace(old, new)
        return token.encode()

    return decode


def _byte_level(token: str, alphabet: dict[str, int] = byte_level_alphabet()) -> bytes:  # noqa: B008  (made once)
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # an added token with characters outside the alphabet stands for itself
        return token.encode()


def _unchanged(data: bytes) -> bytes:
    return data


def _without_one_space(data: bytes) -> bytes:
    return data.removeprefix(b" ")


def _without_spaces(data: bytes) -> bytes:
    return data.replace(b" ", b"")
