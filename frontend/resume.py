"""Going on with a stream whose frontend is lost: what travels with a request for that, and where its client stands.

Every event of a stream has an id, a position: `request:choice:tokens:characters`, all told so far of that choice. The
event that ends a choice counts one token more than it has. Where a stream has several choices, the positions of the
others follow, each behind a comma; a request without one yet is named alone. So the last id that a client has seen
says all that it has seen.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from frontend.detokenizer import TextStream
from frontend.entries import NewRequest
from frontend.errors import ApiError
from frontend.stops import StopAutomaton
from frontend.tokenizer import Tokenizer
from protocol.messages import Submit

RESUMABLE = 32  # choices of a stream; the ids of a larger one would outweigh its text
MAX_EVENT_ID = 4096  # characters

_POSITION = re.compile(r"([0-9a-f]{32})(?::(\d{1,4}):(\d{1,9}):(\d{1,9}))?", re.ASCII)


class TextOptions(msgspec.Struct, array_like=True, frozen=True):
    """How the text of a choice is made of its tokens."""

    stops: list[str]
    include_stop: bool
    skip_special_tokens: bool
    continues: bool  # the text goes on behind the prompt's
    min_tokens: int

    def open(self, tokenizer: Tokenizer) -> functools.partial[TextStream]:
        """What makes a fresh detokenizer of a choice; the stop strings' automaton is one for all of them."""
        return functools.partial(
            TextStream,
            tokenizer,
            StopAutomaton(self.stops) if self.stops else (),
            self.include_stop,
            self.skip_special_tokens,
            continues=self.continues,
            min_tokens=self.min_tokens,
        )


class Header(msgspec.Struct, array_like=True, frozen=True):
    """What another frontend needs to go on answering; SUBMIT carries it, schedulers do not look inside."""

    kind: Literal["chat", "completion"]
    first: int  # the stream's index of the request's first choice
    model: str  # as the client knows it
    created: int
    include_usage: bool
    return_token_ids: bool
    logprobs: bool
    echo: str
    text: TextOptions
    continuous_usage: bool = False
    echo_logprobs: int = -1


@dataclass(frozen=True)
class Position:
    """What a client has of a choice."""

    tokens: int
    characters: int


def parse_event_id(text: str) -> dict[bytes, dict[int, Position]]:
    """The positions of a Last-Event-ID, by request and choice. Raises ApiError (400)."""
    positions: dict[bytes, dict[int, Position]] = {}
    parts = text[: MAX_EVENT_ID + 1].split(",")
    for part in parts:
        match = _POSITION.fullmatch(part)
        if match is None or len(text) > MAX_EVENT_ID or len(parts) > RESUMABLE:
            raise ApiError(400, "Last-Event-ID: this is the id of no event of ours", "Last-Event-ID", "invalid_value")
        request = positions.setdefault(bytes.fromhex(match[1]), {})
        if match[2] is not None:
            request[int(match[2])] = Position(int(match[3]), int(match[4]))
    return positions


def with_headers(new: list[NewRequest], header: Header, echoes: list[str]) -> list[NewRequest]:
    """The requests of a stream, each with what another frontend needs to go on with it."""
    if sum(len(request.seeds) for request in new) > RESUMABLE:
        return new
    made, first = [], 0
    for place, request in enumerate(new):
        mine = msgspec.structs.replace(header, first=first, echo=echoes[place] if echoes else "")
        made.append(replace(request, header=msgspec.msgpack.encode(mine)))
        first += len(request.seeds)
    return made


def read_header(header: bytes) -> Header:
    """Decode a header. Raises LookupError if it is none of this version."""
    if not header:
        raise LookupError(f"it has more than {RESUMABLE} choices, or is no stream")
    try:
        return msgspec.msgpack.decode(header, type=Header)
    except (msgspec.DecodeError, RecursionError) as error:
        raise LookupError(f"its header is unknown here ({error})") from None


def revive(submit: Submit, tokenizer: Tokenizer) -> NewRequest:
    """Another frontend's request as one of ours. Raises LookupError."""
    text = read_header(submit.header).text
    return NewRequest(
        request=submit.request,
        model=submit.model,
        prompt=submit.prompt,
        params=submit.params,
        seeds=[choice.seed for choice in submit.choices],
        open_text=text.open(tokenizer),
        has_stop_strings=bool(text.stops),
        show_stop_ids=text.include_stop,
        deadline=submit.deadline,
        priority=submit.priority,
        tenant=submit.tenant,
        cache_salt=submit.cache_salt,
        header=submit.header,
        trace=submit.trace,
    )
