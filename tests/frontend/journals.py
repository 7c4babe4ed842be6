"""Journals under test: requests, the messages that a scheduler sends them, and what they have to say."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.detokenizer import TextStream
from frontend.entries import Entry, NewRequest
from frontend.journal import Journal
from frontend.tokenizer import Tokenizer
from protocol.columns import pack
from protocol.counters import Counters
from protocol.messages import Message, SamplingParams, Tokens, Welcome
from protocol.times import Times
from protocol.tokenizer_files import byte_bundle

EOS = 256
TOKENIZER = Tokenizer.from_bundle(byte_bundle())
TIMES = Times()
WELCOME = Welcome(1, 7, 1, bytes(16), credit=100)


def request(
    name: int = 1,
    *,
    max_tokens: int = 100,
    n: int = 1,
    stops: Sequence[str] = (),
    stop_ids: Sequence[int] = (EOS,),
    include_stop: bool = False,
    min_tokens: int = 0,
    **more: object,
) -> NewRequest:
    params = SamplingParams(max_tokens, stop_ids=pack(stop_ids), min_tokens=min_tokens, logprobs=more.pop("logprobs", -1))  # type: ignore[arg-type]
    return NewRequest(
        bytes([name] * 16),
        "oracle",
        pack([1, 2, 3]),
        params,
        list(range(n)),
        open_text=lambda: TextStream(TOKENIZER, stops, include_stop, min_tokens=min_tokens),
        has_stop_strings=bool(stops),
        show_stop_ids=include_stop,
        **more,  # type: ignore[arg-type]
    )


def tokens(*rows: tuple[int, int, int, Sequence[int]], admitted: Sequence[tuple[int, int]] = ()) -> Tokens:
    """TOKENS of rows (handle, choice, first index, ids)."""
    message = Tokens(
        pack([row[0] for row in rows]),
        pack([row[1] for row in rows]),
        pack([row[2] for row in rows]),
        pack([len(row[3]) for row in rows]),
        pack([token for row in rows for token in row[3]]),
        admitted=pack([handle for handle, _ in admitted]),
        cached=pack([cached for _, cached in admitted]),
    )
    message.check()
    return message


def opened(**more: object) -> tuple[Journal, Entry]:
    """A journal with an open session and one request, its messages taken off."""
    journal = Journal(1, TIMES, Counters())
    journal.opened(WELCOME, 0.0)
    entry = journal.submit(request(**more), 0.0)  # type: ignore[arg-type]
    journal.out.clear()
    return journal, entry


def sent(journal: Journal) -> list[Message]:
    """What is to be transmitted, each message valid."""
    messages = list(journal.out)
    journal.out.clear()
    for message in messages:
        message.check()
    return messages


def give(journal: Journal, entry: Entry, text: str, first: int | None = None, choice: int = 0) -> None:
    at = len(entry.choices[choice].tokens) if first is None else first
    journal.message(tokens((entry.handle, choice, at, list(text.encode()))), 1.0)
