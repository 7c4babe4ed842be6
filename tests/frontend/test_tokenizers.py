"""The tokenizers of the models: fetched once, built once, asked for again if they did not arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from frontend import tokenizers
from frontend.journal import Journal
from frontend.tokenizer import Tokenizer
from frontend.tokenizers import Tokenizers
from protocol.counters import Counters
from protocol.messages import FileChunk, FileRequest, Models, Welcome
from protocol.times import Times
from tests.frontend.fakes import BUNDLE, MODEL, model_info


class Scene:
    """A journal whose files come at once, and tokenizers whose building waits for `gate`."""

    def __init__(self) -> None:
        self.journal = Journal(1, Times(), Counters())
        self.journal.opened(Welcome(1, 1, 1, bytes(16)), 0.0)
        self.gate = asyncio.Event()
        self.fetched = self.begun = 0
        self.there = True  # whether a worker has the files
        self.tokenizers = Tokenizers(self.journal, self._offload, self.pump, lambda: None)

    async def _offload(self, work: Callable[[], Tokenizer]) -> Tokenizer:
        self.begun += 1
        await self.gate.wait()
        return work()

    def pump(self) -> None:
        """Answer what was asked, and follow."""
        while self.journal.out:
            message = self.journal.out.popleft()
            if isinstance(message, FileRequest):
                self.fetched += 1
                whole = FileChunk(message.tokenizer, message.offset, len(BUNDLE), BUNDLE[message.offset :])
                self.journal.message(whole if self.there else FileChunk(message.tokenizer, message.offset, -1, b""), 0.0)
        self.tokenizers.follow()

    async def workers(self, ready: int) -> None:
        """So many workers of the model are ready now."""
        self.journal.message(Models([model_info(workers_ready=ready)]), 0.0)
        self.tokenizers.follow()
        for _ in range(5):
            await asyncio.sleep(0)

    async def until_here(self) -> None:
        while self.tokenizers.of(MODEL) is None:
            await asyncio.sleep(0.001)


def run(scenario: Callable[[Scene], Awaitable[Any]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scenario(Scene()), 60)

    asyncio.run(main())


def test_what_is_being_built_is_not_fetched_again() -> None:
    async def scenario(scene: Scene) -> None:
        for ready in range(1, 6):
            await scene.workers(ready)
        scene.gate.set()
        await scene.until_here()
        await scene.workers(6)
        assert (scene.fetched, scene.begun) == (1, 1)

    run(scenario)


def test_what_has_not_arrived_is_asked_for_again_after_a_while_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        scene.gate.set()
        scene.there = False
        monkeypatch.setattr(tokenizers, "RETRY_FETCH", 3600.0)
        await scene.workers(1)
        await scene.workers(2)
        assert (scene.fetched, scene.begun) == (1, 0)
        scene.tokenizers.close()

    async def again(scene: Scene) -> None:
        scene.gate.set()
        scene.there = False
        monkeypatch.setattr(tokenizers, "RETRY_FETCH", 0.0)
        await scene.workers(1)
        scene.there = True
        await scene.until_here()
        assert scene.fetched >= 2

    run(scenario)
    run(again)


def test_what_was_not_built_for_a_defect_of_ours_is_fetched_again_with_the_next_news() -> None:
    async def scenario(scene: Scene) -> None:
        offload = scene.tokenizers._offload

        async def broken(work: Callable[[], Tokenizer]) -> Tokenizer:
            raise OSError("no threads")

        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        scene.tokenizers._offload = broken
        await scene.workers(1)
        scene.tokenizers._offload = offload
        scene.gate.set()
        await scene.workers(2)
        await scene.until_here()
        assert scene.fetched == 2

    run(scenario)


def test_once_closed_nothing_is_built_of_what_still_arrives() -> None:
    async def scenario(scene: Scene) -> None:
        scene.tokenizers.close()
        await scene.workers(1)
        scene.pump()
        assert (scene.fetched, scene.begun) == (0, 0)

    run(scenario)
