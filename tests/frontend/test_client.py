"""The client over real sockets: sessions found, lost and found again, and the tokenizer fetched over the wire."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from frontend.client import Client
from frontend.detokenizer import TextStream
from frontend.entries import NewRequest
from frontend.errors import ApiError
from frontend.tokenizer import Tokenizer
from protocol.columns import pack
from protocol.messages import Abort, Done, Resumed, SamplingParams, Submit
from protocol.times import Times
from protocol.tokenizer_files import bundle_hash, byte_bundle
from tests.e2e.stack import eventually
from tests.frontend import fakes
from tests.frontend.fakes import EOS, Engine, scheduler_thread, settings_for, text

TOKENIZER = Tokenizer.from_bundle(byte_bundle())
SLOW = 0.05  # seconds of a token, so that what is to be cut off outlasts a machine that stands still
PATIENT = Times(silence=5.0, window=5.0)  # a test that stands still for less keeps its session


@pytest.fixture
def folder() -> Iterator[Path]:
    """A private folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as path:
        yield Path(path)


def endpoint(folder: Path, number: int = 0) -> str:
    return f"ipc://{folder}/s{number}.sock"


def request(name: int = 1, max_tokens: int = 50, n: int = 1) -> NewRequest:
    params = SamplingParams(max_tokens, stop_ids=pack([EOS]))
    return NewRequest(bytes([name] * 16), "oracle", pack([1, 2]), params, list(range(n)), functools.partial(TextStream, TOKENIZER))


def run(folder: Path, scenario: Callable[[Client], Awaitable[Any]], schedulers: int = 1, times: Times = PATIENT) -> Any:
    """Run a scenario with a client in an event loop of its own."""

    async def main() -> Any:
        endpoints = tuple(endpoint(folder, i) for i in range(schedulers))
        client = Client(settings_for(folder / "run", schedulers=endpoints, times=times), 7)
        await client.start()
        try:
            return await asyncio.wait_for(scenario(client), 60)
        finally:
            await client.stop()

    return asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_requests_are_answered_with_every_token(folder):
    async def scenario(client: Client) -> list[str]:
        await until(lambda: not client.why_not_ready())
        stream = client.submit([request(i, n=2) for i in range(20)])
        await stream.end()
        texts = [choice.take() for entry in stream.entries for choice in entry.choices]
        stream.close()
        await until(lambda: any(isinstance(m, Done) for m in engine.messages))
        return texts

    engine = Engine()
    with scheduler_thread(endpoint(folder), engine):
        assert run(folder, scenario) == [text(50, choice) for _ in range(20) for choice in range(2)]


def test_without_a_scheduler_nothing_can_be_asked(folder):
    async def scenario(client: Client) -> None:
        assert client.why_not_ready() == "no scheduler has answered yet"
        with pytest.raises(ApiError, match="not ready"):
            client.model(None)

    run(folder, scenario)


def test_the_tokenizer_comes_over_the_wire(folder):
    async def scenario(client: Client) -> list[int]:
        await until(lambda: not client.why_not_ready())
        return client.model("oracle").tokenizer.encode_batch(["hi"])[0]

    with scheduler_thread(endpoint(folder), Engine()):
        assert run(folder, scenario) == [104, 105]


def test_files_that_are_no_tokenizer_are_asked_for_once_and_named(folder, monkeypatch):
    bundle = msgspec.msgpack.encode({"tokenizer.json": b"{}"})
    monkeypatch.setattr(fakes, "BUNDLE", bundle)
    monkeypatch.setattr(fakes, "MODEL", fakes.model_info(tokenizer=bundle_hash(bundle)))

    async def scenario(client: Client) -> str:
        await until(client.why_never_ready)
        assert client.why_not_ready() == client.why_never_ready()
        with pytest.raises(ApiError, match="cannot be used"):
            client.model(None)
        client.journal.models_changed = True  # as a worker that comes makes it
        client._pumped(0.0)
        assert not client._tokenizers._fetches
        return client.why_not_ready()

    with scheduler_thread(endpoint(folder), Engine()):
        assert "tokenizer.json cannot be used" in run(folder, scenario)


def test_a_request_made_before_the_scheduler_waits_for_it(folder):
    async def scenario(client: Client) -> str:
        stream = client.submit([request()])
        await asyncio.sleep(0.05)
        with scheduler_thread(endpoint(folder), Engine()):
            await stream.end()
        return stream.entries[0].choices[0].take()

    assert run(folder, scenario) == text(50)


def test_streams_survive_their_scheduler(folder):
    async def scenario(client: Client) -> list[str]:
        first = Engine()
        with scheduler_thread(endpoint(folder), first, SLOW):
            stream = client.submit([request(i, 200) for i in range(5)])
            await until(lambda: all(len(entry.choices[0].tokens) > 20 for entry in stream.entries))
        assert first.live, "it went with the requests unfinished"
        await until(lambda: not client.journal.is_open)
        known = [len(entry.choices[0].tokens) for entry in stream.entries]
        second = Engine()
        with scheduler_thread(endpoint(folder), second, epoch=2):
            await stream.end()
        submits = [m for m in second.messages if isinstance(m, Submit)]
        assert [len(m.choices[0].known) // 4 for m in submits] == known
        assert all(m.admitted for m in submits)
        assert Resumed(5) in second.messages
        return [entry.choices[0].take() for entry in stream.entries]

    assert run(folder, scenario) == [text(200)] * 5


@pytest.mark.slow
def test_a_scheduler_of_a_higher_epoch_takes_the_streams_over(folder):
    async def scenario(client: Client) -> str:
        stream = client.submit([request(max_tokens=200)])
        with contextlib.ExitStack() as stack:
            stack.enter_context(scheduler_thread(endpoint(folder, 0), Engine(), SLOW))
            await until(lambda: len(stream.entries[0].choices[0].tokens) > 10)
            second = Engine()
            stack.enter_context(scheduler_thread(endpoint(folder, 1), second, epoch=2))
            await stream.end()
            assert second.messages
        return stream.entries[0].choices[0].take()

    assert run(folder, scenario, schedulers=2) == text(200)


def test_closing_a_stream_aborts_what_still_runs(folder):
    async def scenario(client: Client) -> None:
        stream = client.submit([request(max_tokens=400)])
        await until(lambda: stream.entries[0].choices[0].tokens)
        stream.close()
        stream.close()
        await until(lambda: any(isinstance(m, Done) for m in engine.messages))
        assert sum(isinstance(m, Abort) for m in engine.messages) == 1
        assert client.totals.aborted == 1
        assert not client.journal.entries()

    engine = Engine()
    with scheduler_thread(endpoint(folder), engine, SLOW):
        run(folder, scenario)


def test_a_client_that_stops_tells_the_scheduler(folder):
    async def scenario(client: Client) -> None:
        stream = client.submit([request(max_tokens=400)])
        await until(lambda: stream.entries[0].choices[0].tokens)

    engine = Engine()
    with scheduler_thread(endpoint(folder), engine, SLOW):
        run(folder, scenario)
        eventually(lambda: any(isinstance(m, Abort) for m in engine.messages))


def test_a_client_that_stops_ends_who_waits_for_its_streams(folder):
    async def scenario(client: Client) -> str:
        stream = client.submit([request(max_tokens=400)])
        waiting = asyncio.create_task(stream.end())
        await until(lambda: stream.entries[0].choices[0].tokens)
        await client.stop()
        await asyncio.wait_for(waiting, 10)
        assert stream.error is not None
        return stream.error.message

    with scheduler_thread(endpoint(folder), Engine(), SLOW):
        assert "closed" in run(folder, scenario)


@pytest.mark.slow
def test_an_idle_client_sleeps_between_its_heartbeats(folder):
    async def scenario(client: Client) -> int:
        await until(lambda: client.journal.is_open)
        ticks = 0
        tick = client.link._tick

        def counted() -> None:
            nonlocal ticks
            ticks += 1
            tick()

        async def of_a_second() -> int:
            before = ticks
            await asyncio.sleep(1.0)
            return ticks - before

        client.link._tick = counted  # type: ignore[method-assign]
        for _ in range(3):  # a standstill wakes it more often
            if (found := await of_a_second()) <= 6:
                break
        return found

    with scheduler_thread(endpoint(folder), Engine()):
        assert run(folder, scenario, times=Times()) <= 6  # it answers the scheduler's heartbeats, and needs none of its own


def test_it_is_told_at_once_when_requests_can_be_taken_and_when_they_no_longer_can(folder):
    async def scenario(client: Client) -> None:
        told = [False]
        client.changed = lambda: told.append(not client.why_not_ready())
        for _ in range(2):
            with scheduler_thread(endpoint(folder), Engine()):
                await until(lambda: not client.why_not_ready())
                assert told[-1]
            await until(client.why_not_ready)
            assert not told[-1]

    run(folder, scenario)
