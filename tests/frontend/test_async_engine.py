"""The asynchronous engine at a scripted scheduler: closing it ends everybody who waits for outputs."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from frontend.async_engine import AsyncLLMEngine, RequestFailed
from frontend.offline import Prepared, SamplingParams, prepare
from tests.frontend.fakes import Engine, scheduler_in

LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A private one whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as path:
        yield Path(path)


def run(run_dir: Path, scenario: Callable[[AsyncLLMEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncLLMEngine(run_dir=run_dir) as engine:
            await asyncio.wait_for(scenario(engine), 60)

    with scheduler_in(run_dir, Engine(), interval=0.05):
        asyncio.run(main())


async def fails_closed(task: asyncio.Task[None]) -> None:
    with pytest.raises(RequestFailed, match="closed"):
        await task


def test_who_waits_for_an_output(run_dir: Path) -> None:
    async def scenario(engine: AsyncLLMEngine) -> None:
        begun = asyncio.Event()

        async def consume() -> None:
            async for _ in engine.generate("x", LONG):
                begun.set()

        task = asyncio.create_task(consume())
        await begun.wait()
        await engine.close()
        await fails_closed(task)

    run(run_dir, scenario)


@pytest.mark.parametrize("made_before", [True, False])
def test_whose_prompts_are_still_made_or_wait_for_a_thread(run_dir: Path, made_before: bool) -> None:
    async def scenario(engine: AsyncLLMEngine) -> None:
        gate, model = threading.Event(), engine.model()

        def make(i: int) -> Prepared:
            gate.wait(60)
            return prepare(model, [104], LONG, True)

        async def consume() -> None:
            async for _ in engine.outputs(engine.prepared(make, 3)):
                pass

        tasks = [asyncio.create_task(consume()) for _ in range(4)]  # more than there are threads
        await asyncio.sleep(0)
        if made_before:
            gate.set()
        await engine.close()
        gate.set()
        for task in tasks:
            await fails_closed(task)

    run(run_dir, scenario)
