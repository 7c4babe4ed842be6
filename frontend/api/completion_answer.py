"""An answer as a text completion: the prompt echoed if asked for, and log probabilities in columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frontend.api.answers import Answer
from frontend.entries import Choice, Entry, TokenLogprobs
from protocol.columns import unpack


class CompletionAnswer(Answer):
    """`text_completion`, whole and as chunks."""

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"
    text_open = b',"text":'
    text_close = b',"logprobs":null,"finish_reason":null'

    def begin(self, entry: Entry, place: int, first: int, choice: Choice, out: list[bytes]) -> None:
        echo = self._form.echoes[place] if self._form.echoes else ""
        if echo or self._form.echo_logprobs >= 0 or self._form.return_token_ids:
            logprobs = self._of_tokens(self._echoed(entry), place, choice) if self._form.echo_logprobs >= 0 else None
            body: dict[str, Any] = self.delta(echo) | {"logprobs": logprobs, "finish_reason": None} | self.prompt(entry)
            self._event(place, first, choice, body, out)

    def place_prompt(self, body: dict[str, Any], beside: dict[str, Any], told: dict[str, Any]) -> None:
        body.update(told)

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def body(self, text: str, place: int) -> dict[str, Any]:
        return {"text": (self._form.echoes[place] if self._form.echoes else "") + text}

    def logprobs(self, choice: Choice, place: int) -> dict[str, Any] | None:
        if not self._form.logprobs:
            return None
        items: list[TokenLogprobs | int] = [*choice.take_logprobs()]
        entry = self._stream.entries[place]
        if self._form.echo_logprobs >= 0 and (entry.handle, choice.index) not in self._begun:  # an answer in one piece
            items = [*self._echoed(entry), *items]
        return self._of_tokens(items, place, choice)

    def _echoed(self, entry: Entry) -> list[TokenLogprobs | int]:
        """The prompt's tokens; the first has an id only."""
        shown = self._form.echo_logprobs + 1
        return [int(unpack(entry.new.prompt)[0]), *(TokenLogprobs(one.ids[:shown], one.values[:shown], one.rank) for one in entry.scores)]

    def _by_text(self, item: TokenLogprobs) -> dict[str, float]:
        """Log probabilities by text. Of tokens that read the same, the token's own or else the most probable one counts."""
        values: dict[str, float] = {}
        for id, value in zip(item.ids, item.values, strict=True):
            values.setdefault(self._token(id), value)
        return values

    def _of_tokens(self, items: Sequence[TokenLogprobs | int], place: int, choice: Choice) -> dict[str, Any]:
        """OpenAI's columns; a token may be an id without log probabilities."""
        tokens = [self._token(item if isinstance(item, int) else item.ids[0]) for item in items]
        offset = self._offsets.get((place, choice.index), 0)
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[place, choice.index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [None if isinstance(item, int) else item.values[0] for item in items],
            # the alternatives, and the token itself whether or not it is among them
            "top_logprobs": [None if isinstance(item, int) else self._by_text(item) for item in items],
            "text_offset": offsets,
        }
