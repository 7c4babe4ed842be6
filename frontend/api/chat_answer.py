"""An answer as a chat completion: a message with a role, and log probabilities token by token."""

from __future__ import annotations

from typing import Any

from frontend.api.answers import Answer
from frontend.entries import Choice, Entry, TokenLogprobs


class ChatAnswer(Answer):
    """`chat.completion` and its chunks."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    text_open = b',"delta":{"content":'
    text_close = b'},"logprobs":null,"finish_reason":null'

    def begin(self, entry: Entry, place: int, first: int, choice: Choice, out: list[bytes]) -> None:
        body: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        self._event(place, first, choice, body, out, beside=self.prompt(entry))

    def place_prompt(self, body: dict[str, Any], beside: dict[str, Any], told: dict[str, Any]) -> None:
        beside.update(told)

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def body(self, text: str, place: int) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, choice: Choice, place: int) -> dict[str, Any] | None:
        if not self._form.logprobs:
            return None
        return {"content": [self._one(item) | {"top_logprobs": self._top(item)} for item in choice.take_logprobs()]}

    def _one(self, item: TokenLogprobs, at: int = 0) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(item.ids[at])
        return {"token": data.decode(errors="replace"), "logprob": item.values[at], "bytes": list(data)}

    def _top(self, item: TokenLogprobs) -> list[dict[str, Any]]:
        return [self._one(item, at) for at in range(1, len(item.ids))]
