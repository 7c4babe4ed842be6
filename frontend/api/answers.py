"""How the outputs of a request are written: whole, or as the events of a stream. `chat_answer` and `completion_answer` fill in the text."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from frontend.entries import Choice, Entry, TokenLogprobs
from frontend.errors import ApiError, from_failed
from frontend.resume import RESUMABLE, Position
from frontend.sse import DONE, WAITING
from frontend.streams import Stream
from frontend.tokenizer import Tokenizer
from protocol.columns import unpack

_encode = msgspec.json.Encoder().encode
AT_ONCE = 4096  # log probabilities that a stream writes before others have their turn; each takes 3 µs


@dataclass(frozen=True)
class Form:
    """What a client asked about the form of its answer."""

    model: str  # as the client knows it
    created: int  # seconds since 1970
    eos: frozenset[int] = frozenset()
    include_usage: bool = False
    continuous_usage: bool = False  # with each chunk, that of its choice so far
    return_token_ids: bool = False
    logprobs: bool = False
    prompt_logprobs: int = -1  # alternatives shown of each prompt token, in vLLM's form; −1: none
    echo_logprobs: int = -1  # the same where the prompt is echoed with log probabilities, in OpenAI's form
    best: int = 0  # choices shown of each prompt, the best by cumulative logprob; 0: all, in their order
    echoes: Sequence[str] = ()  # completions with `echo`: the text of each prompt


def ranked(entry: Entry, count: int) -> list[Choice]:
    """The `count` choices of an ended request whose tokens have the largest sum of log probabilities, best first.

    Their log probabilities must not have been taken yet.
    """

    def cumulative(choice: Choice) -> float:
        return sum(item.values[0] for item in choice.fresh_logprobs)

    return sorted(entry.choices, key=cumulative, reverse=True)[:count]


class Answer(ABC):
    """Base of the two kinds. Says nothing twice: a choice's role, its end, and each token are told once."""

    id_prefix = ""
    object = ""
    chunk_object = ""
    text_open = b""  # what stands around a chunk's text, from the choice's index on
    text_close = b""

    def __init__(self, stream: Stream, tokenizer: Tokenizer, form: Form) -> None:
        self._stream = stream
        self._tokenizer = tokenizer
        self._form = form
        self.id = self.id_prefix + stream.entries[0].request.hex()
        self._about = {"id": self.id, "object": self.chunk_object, "created": form.created, "model": form.model}
        self._head = b"data: " + _encode(self._about)[:-1] + b',"choices":[{"index":'
        self._tail = (b',"usage":null}' if form.include_usage else b"}") + b"\n\n"
        self._plain_tail = b"}]" + self._tail
        self._plain = not (form.logprobs or form.return_token_ids or form.continuous_usage)
        self._names = [entry.request.hex().encode() for entry in stream.entries]
        self._places: dict[int, tuple[int, int]] = {}  # handle → (place of its prompt, index of its first choice)
        self._ended: set[tuple[int, int]] = set()
        self._begun: set[tuple[int, int]] = set()  # (handle, choice), here or by a frontend that is lost
        self._told: dict[bytes, dict[int, bytes]] = {name: {} for name in self._names}  # the positions that ids name
        self._offsets: dict[tuple[int, int], int] = {}  # characters of the tokens told, for text_offset
        first = 0
        for place, entry in enumerate(stream.entries):
            self._places[entry.handle] = place, first
            first += len(entry.choices)
        self._listed = 1 < first <= RESUMABLE
        self._room = AT_ONCE  # log probabilities that may still be written in this turn

    def resume(self, positions: Mapping[bytes, Mapping[int, Position]]) -> None:
        """Leave out what the client has from another frontend. Raises ApiError for a position beyond what there is."""
        for place, entry in enumerate(self._stream.entries):
            for index, position in positions.get(entry.request, {}).items():
                choice = entry.choices[index] if index < len(entry.choices) else None
                ended = choice is not None and bool(choice.finish_reason) and position.tokens == len(choice.tokens) + 1
                if choice is None or position.tokens - ended > len(choice.tokens) or position.characters > choice.characters:
                    raise ApiError(400, "Last-Event-ID: the stream has not come so far", "Last-Event-ID", "invalid_value")
                self._begun.add((entry.handle, index))
                if ended:
                    self._ended.add((entry.handle, index))
                choice.skip(position.tokens - ended, position.characters)
                echoed = unpack(entry.new.prompt).tolist() if self._form.echo_logprobs >= 0 else []
                told = [*echoed, *choice.tokens[: choice.taken]]
                self._offsets[place, index] = sum(len(self._token(token)) for token in told)
                self._id(place, index, position.tokens, position.characters)

    def _id(self, place: int, index: int, tokens: int, characters: int) -> bytes:
        """The id of an event: where the client stands once it has it (`frontend/resume.py`)."""
        mine = self._names[place]
        own = b"%b:%d:%d:%d" % (mine, index, tokens, characters)
        if not self._listed:
            return own
        self._told[mine][index] = own
        ids = [own]
        for name, told in self._told.items():
            ids += [position for i, position in told.items() if name != mine or i != index]
            if not told:
                ids.append(name)
        return b",".join(ids)

    # ---------------------------------------------------------------- streamed

    async def events(self) -> AsyncIterator[bytes]:
        """The events of the whole stream, those of one step together; ends early if the client has gone."""
        stream = self._stream
        while True:
            await stream.news()
            if stream.gone:
                return
            out: list[bytes] = []
            self._room, left = AT_ONCE, False
            for entry in stream.take():
                if entry.moved:
                    return
                if self.entry_events(entry, out):
                    left = True
                    stream.touch(entry, stream.woken)
                if entry.error is not None:
                    stream.error = from_failed(entry.error)
            if stream.error is not None:
                out += (b"data: ", _encode(stream.error.body()), b"\n\n", DONE)
                yield b"".join(out)
                return
            if left:
                yield b"".join(out)
                await asyncio.sleep(0)
                continue
            if stream.ended:
                if self._form.include_usage:
                    out += (b"data: ", _encode({**self._about, "choices": [], "usage": self.usage()}), b"\n\n")
                out.append(DONE)
                yield b"".join(out)
                return
            if stream.quiet and not out:
                out.append(WAITING)
            stream.quiet = False
            if out:
                yield b"".join(out)

    def entry_events(self, entry: Entry, out: list[bytes]) -> bool:
        """Append the events of what is new about an entry. Returns whether there is more of it than fits into this turn."""
        if entry.unscored:  # the prompt's log probabilities come before anything else
            return False
        place, first = self._places[entry.handle]
        for choice in entry.choices:
            length = len(choice.tokens)
            if length > choice.taken:
                if self._room <= 0:
                    return True
                if not choice.taken:
                    self._open(entry, place, first, choice, out)
                if self._plain:
                    if choice.fresh:
                        text = _encode(choice.take())
                        index = first + choice.index
                        out.append(b"id: %b\n" % self._id(place, choice.index, length, choice.characters))
                        out.append(b"%b%d%b%b%b%b" % (self._head, index, self.text_open, text, self.text_close, self._plain_tail))
                    else:
                        choice.take()
                else:
                    self._full_event(place, first, choice, out)
                    if length > choice.taken:
                        return True
            reason = choice.finish_reason
            if reason and reason != "error" and (entry.handle, choice.index) not in self._ended:
                if self._room <= 0:
                    return True
                self._ended.add((entry.handle, choice.index))
                if not choice.taken:
                    self._open(entry, place, first, choice, out)
                if choice.fresh:  # withheld until the end, and let out by something that was no token
                    self._full_event(place, first, choice, out)
                end = {"finish_reason": reason, "stop_reason": self.stop_reason(choice)}
                self._event(place, first, choice, self.delta("") | {"logprobs": None} | end, out, 1)
        return False

    def _open(self, entry: Entry, place: int, first: int, choice: Choice, out: list[bytes]) -> None:
        if (entry.handle, choice.index) not in self._begun:
            self._begun.add((entry.handle, choice.index))
            self._room -= len(entry.scores) * (self._form.echo_logprobs + 1)
            self.begin(entry, place, first, choice, out)

    @abstractmethod
    def begin(self, entry: Entry, place: int, first: int, choice: Choice, out: list[bytes]) -> None:
        """Append the event that comes before a choice's first token, if this kind of answer has one."""

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """The part of a chunk's choice that holds its text."""

    @abstractmethod
    def logprobs(self, choice: Choice, place: int) -> dict[str, Any] | None:
        """The log probabilities of the tokens since the last call; None if none were asked for."""

    def _full_event(self, place: int, first: int, choice: Choice, out: list[bytes]) -> None:
        """Append the event of a choice's new tokens; of more log probabilities than fit into a turn, a part without the text."""
        start, end = choice.taken, len(choice.tokens)
        if self._form.logprobs:
            each = self._stream.entries[place].new.params.logprobs + 1
            end = min(end, start + max(AT_ONCE // each, 1))
            self._room -= (end - start) * each
        text = ""
        if end < len(choice.tokens):
            choice.take_tokens(end - start)
        else:
            text = choice.take()
        body = self.delta(text) | {"logprobs": self.logprobs(choice, place), "finish_reason": None}
        if self._form.return_token_ids:
            body["token_ids"] = choice.tokens[start:end]
        self._event(place, first, choice, body, out)

    def _event(
        self,
        place: int,
        first: int,
        choice: Choice,
        body: dict[str, Any],
        out: list[bytes],
        end: int = 0,
        beside: dict[str, Any] | None = None,
    ) -> None:
        """Append an event; `end`: 1 if it ends the choice; `beside`: what stands beside its choices."""
        shown = choice.characters - len(choice.fresh)
        tail = self._tail
        if self._form.continuous_usage:
            usage = _encode(_usage(self._stream.entries[place].prompt_tokens, choice.taken))
            tail = b',"usage":%b}\n\n' % usage
        if beside:
            tail = b",%b%b" % (_encode(beside)[1:-1], tail)
        out.append(b"id: %b\n" % self._id(place, choice.index, choice.taken + end, shown))
        out.append(b"%b%d,%b}]%b" % (self._head, first + choice.index, _encode(body)[1:-1], tail))

    # ---------------------------------------------------------------- whole

    @property
    def log_probabilities(self) -> int:
        """How many of them `whole` may have to write; they take nearly all its time."""
        return sum(
            sum(len(choice.tokens) for choice in entry.choices) * (entry.new.params.logprobs + 1)
            + len(entry.choices) * len(entry.scores) * (entry.new.params.prompt_logprobs + 1)
            for entry in self._stream.entries
        )

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed, its choices encoded. Raises ApiError if a request failed."""
        choices: list[msgspec.Raw] = []
        beside: dict[str, Any] = {}
        for entry in self._stream.entries:
            if entry.error is not None:
                raise from_failed(entry.error)
            if entry.moved:
                raise ApiError(503, "another frontend answers this request now", code="moved")
            place, first = self._places[entry.handle]
            best, told = self._form.best, self.prompt(entry)
            for nth, choice in enumerate(ranked(entry, best) if best else entry.choices):
                text = choice.take()
                body = (
                    {"index": place * best + nth if best else first + nth}
                    | self.body(text, place)
                    | {"logprobs": self.logprobs(choice, place)}
                )
                body |= {"finish_reason": choice.finish_reason, "stop_reason": self.stop_reason(choice)}
                if self._form.return_token_ids:
                    body |= {"token_ids": choice.tokens}
                self.place_prompt(body, beside, told)
                choices.append(msgspec.Raw(_encode(body)))  # a long one is thousands of objects, which need not wait for the others
        return {**self._about, "object": self.object, "choices": choices, "usage": self.usage(), **beside}

    def prompt(self, entry: Entry) -> dict[str, Any]:
        """What was asked for about a prompt, in vLLM's form."""
        told: dict[str, Any] = {}
        if self._form.prompt_logprobs >= 0:
            told["prompt_logprobs"] = [None, *(self._by_id(item) for item in entry.scores)]
        if self._form.return_token_ids:
            told["prompt_token_ids"] = unpack(entry.new.prompt).tolist()
        return told

    @abstractmethod
    def place_prompt(self, body: dict[str, Any], beside: dict[str, Any], told: dict[str, Any]) -> None:
        """Put what is told about a prompt into a choice's `body`, or `beside` the choices."""

    def _by_id(self, item: TokenLogprobs) -> dict[str, Any]:
        shown = self._form.prompt_logprobs + 1
        told: dict[str, Any] = {}
        for rank, (id, value) in enumerate(zip(item.ids[:shown], item.values[:shown], strict=True)):
            told.setdefault(str(id), {"logprob": value, "rank": rank or item.rank, "decoded_token": self._token(id)})
        return told

    @abstractmethod
    def body(self, text: str, place: int) -> dict[str, Any]:
        """The part of a whole choice that holds its text."""

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage, of all prompts and choices together."""
        entries = self._stream.entries
        prompt = sum(entry.prompt_tokens for entry in entries)
        completion = sum(len(choice.tokens) for entry in entries for choice in entry.choices)
        cached = sum(max(entry.cached, 0) for entry in entries)
        return _usage(prompt, completion) | {"prompt_tokens_details": {"cached_tokens": cached}}

    def stop_reason(self, choice: Choice) -> str | int | None:
        """What the client named that ended the choice: a stop string or a stop id; None for EOS and length."""
        return None if choice.stop_reason in self._form.eos else choice.stop_reason

    def _token(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
