"""A stream that has fallen behind (its client reads slowly) writes what has come meanwhile in turns, between which others have theirs."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import msgspec
import pytest

from frontend.api.answers import AT_ONCE, Answer, Form
from frontend.api.chat_answer import ChatAnswer
from frontend.api.completion_answer import CompletionAnswer
from frontend.detokenizer import TextStream
from frontend.entries import Entry, NewRequest, TokenLogprobs
from frontend.measures import Measures
from frontend.streams import Stream
from frontend.tokenizer import Tokenizer
from protocol.columns import pack
from protocol.messages import SamplingParams
from protocol.tokenizer_files import byte_bundle

TOKENIZER = Tokenizer.from_bundle(byte_bundle())
ALTERNATIVES = 20
TOKENS = AT_ONCE // ALTERNATIVES * 3
PART = AT_ONCE // (ALTERNATIVES + 1)


def ended(choices: int) -> Entry:
    """A request whose tokens have all come before any was told."""
    params = SamplingParams(TOKENS, logprobs=ALTERNATIVES)
    new = NewRequest(bytes(16), "m", pack([65]), params, range(choices), lambda: TextStream(TOKENIZER))
    entry = Entry(new, 0, 0.0, Measures())
    for choice in entry.choices:
        ids = [97 + (at + choice.index) % 26 for at in range(TOKENS)]
        choice.extend(ids, [TokenLogprobs([id] * (ALTERNATIVES + 1), [-0.5] * (ALTERNATIVES + 1), 1) for id in ids])
    entry.unfinished = 0
    return entry


async def told(kind: type[Answer], entry: Entry, form: Form) -> tuple[list[list[tuple[str, dict[str, Any]]]], list[int]]:
    """The events, id and choice, of each turn; and how often another task had run by then."""
    stream = Stream([entry], lambda stream: None, 0.0)
    stream.touch(entry, 0.0)
    runs = 0

    async def other() -> None:
        nonlocal runs
        while True:
            runs += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    turns, seen = [], []
    async for part in kind(stream, TOKENIZER, form).events():
        seen.append(runs)
        events = []
        for event in part.decode().split("\n\n"):
            if event.startswith("id: "):
                id, data = event.split("\n")
                events.append((id.removeprefix("id: "), msgspec.json.decode(data.removeprefix("data: "))["choices"][0]))
        turns.append(events)
    task.cancel()
    return turns, seen


def length(choice: dict[str, Any]) -> int:
    """Of how many tokens an event has log probabilities."""
    logprobs = choice["logprobs"] or {}
    return len(logprobs.get("content", logprobs.get("tokens", [])))


@pytest.mark.parametrize("kind", [ChatAnswer, CompletionAnswer])
def test_log_probabilities_are_written_in_turns(kind: type[Answer]) -> None:
    turns, seen = asyncio.run(told(kind, ended(2), Form("m", 1, logprobs=True, return_token_ids=True)))
    assert max(sum(length(choice) for _, choice in events) for events in turns) <= 2 * PART
    assert all(later > earlier for earlier, later in itertools.pairwise(seen)), "others run between two turns"
    for index in range(2):
        mine = [choice for events in turns for _, choice in events if choice["index"] == index]
        assert sum(map(length, mine)) == TOKENS
        assert [id for choice in mine for id in choice.get("token_ids", [])] == [97 + (at + index) % 26 for at in range(TOKENS)]
        text = "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in mine)
        assert text == "".join(chr(97 + (at + index) % 26) for at in range(TOKENS))
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]


def test_the_id_of_a_part_counts_its_tokens_and_no_text() -> None:
    turns, _ = asyncio.run(told(CompletionAnswer, ended(1), Form("m", 1, logprobs=True)))
    ids = [id.split(":")[2:] for events in turns for id, _ in events]
    assert ids[0] == [str(PART), "0"]
    assert ids[-1] == [str(TOKENS + 1), str(TOKENS)]


def test_text_alone_is_written_at_once() -> None:
    turns, _ = asyncio.run(told(CompletionAnswer, ended(2), Form("m", 1)))
    assert len(turns) == 1


def test_echoed_prompts_take_turns_though_no_token_follows() -> None:
    scored = 600
    new = NewRequest(bytes(16), "m", pack([65] * scored), SamplingParams(0, prompt_logprobs=5), range(8), lambda: TextStream(TOKENIZER))
    entry = Entry(new, 0, 0.0, Measures())
    entry.scores = [TokenLogprobs([65] * 6, [-0.5] * 6, 1) for _ in range(scored - 1)]
    entry.scored = scored
    for choice in entry.choices:
        choice.end("length")
    entry.unfinished = 0
    turns, _ = asyncio.run(told(CompletionAnswer, entry, Form("m", 1, echoes=["A" * scored], logprobs=True, echo_logprobs=5)))
    written = [sum(length(choice) for _, choice in events) for events in turns]
    assert sum(written) == 8 * scored
    assert max(written) <= 2 * scored
    ends = [choice["index"] for events in turns for _, choice in events if choice["finish_reason"]]
    assert ends == list(range(8))
