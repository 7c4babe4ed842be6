"""Tokens to text, one token at a time, never half a character and never the beginning of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from frontend.stops import StopAutomaton, StopMatcher
from frontend.vocabulary import REPLACEMENT, Vocabulary

if TYPE_CHECKING:
    from frontend.tokenizer import Tokenizer


class Decoder(Protocol):
    """Turns tokens into text incrementally."""

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come."""

    def flush(self) -> str:
        """The text of what is left, if nothing more comes."""


class VocabularyDecoder:
    """Decodes with a vocabulary's bytes: bytes of an unfinished UTF-8 character wait, invalid ones become U+FFFD.

    `continues`: the text goes on behind other text, so that the first token keeps its leading space.
    """

    __slots__ = ("_first", "_pending", "_texts")

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool, continues: bool) -> None:
        self._texts = vocabulary.bare if skip_special_tokens else vocabulary.shown
        self._first = None if continues else vocabulary.first
        self._pending = b""

    def push(self, token: int) -> str:
        if not self._pending and self._first is None and (text := self._texts[token]) is not None:
            return text
        data = self._texts.data(token)
        if self._first is not None and data:
            data, self._first = self._first(data), None
        data = self._pending + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        rest, self._pending = self._pending, b""
        return rest.decode(errors="replace")


class WindowDecoder:
    """Decodes with a batch decoder that nothing is known about: a few tokens again and again, showing what was added.

    The window begins at the last place where the text was whole, so a push costs a few tokens' decoding.
    """

    __slots__ = ("_decode", "_shown", "_window")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0  # tokens at the window's start whose text is out

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._added()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text

    def flush(self) -> str:
        text = self._added()
        self._window, self._shown = [], 0
        return text

    def _added(self) -> str:
        before = self._decode(self._window[: self._shown]) if self._shown else ""
        return self._decode(self._window)[len(before) :]


def decode_all(decoder: Decoder, tokens: Iterable[int]) -> str:
    """The text of all `tokens`."""
    return "".join([*map(decoder.push, tokens), decoder.flush()])


class TextStream:
    """The text of one choice as its tokens come.

    stop: the stop string found, or None; the text is cut in front of it, or behind it with `include_stop`.
    text_length: characters released so far.
    """

    __slots__ = ("_decoder", "_include_stop", "_matcher", "_unsearched", "stop", "text_length")

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: StopAutomaton | Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        *,
        continues: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`continues`: the text goes on behind a prompt (completions), so the first token keeps its leading space.
        `stops`: strings, or their automaton where other choices have it too.
        `min_tokens`: no stop string is looked for in the text of that many tokens. Raises ValueError for an empty stop.
        """
        self._decoder = tokenizer.decoder(skip_special_tokens, continues)
        self._matcher = StopMatcher(stops) if stops else None
        self._include_stop = include_stop
        self._unsearched = min_tokens
        self.stop: str | None = None
        self.text_length = 0

    def push(self, token: int) -> str:
        """The text that may be shown now; empty once a stop string is found."""
        if self.stop is not None:
            return ""
        text = self._decoder.push(token)
        if self._matcher is not None:
            if self._unsearched > 0:
                self._unsearched -= 1
            else:
                text = self._search(self._matcher, text)
        self.text_length += len(text)
        return text

    def flush(self) -> str:
        """The rest, at the end of the choice."""
        if self.stop is not None:
            return ""
        text = self._decoder.flush()
        if self._matcher is not None:
            text = self._search(self._matcher, text) + self._matcher.flush()
        self.text_length += len(text)
        return text

    def _search(self, matcher: StopMatcher, text: str) -> str:
        text = matcher.push(text)
        self.stop = matcher.stop
        return text + self.stop if self.stop is not None and self._include_stop else text
