"""An engine in a thread of its own, for programs without an event loop."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from frontend.async_engine import CLOSED, AsyncLLMEngine

T = TypeVar("T")


class Background:
    """An `AsyncLLMEngine` in a thread of its own, for programs without an event loop."""

    def __init__(self, engine: AsyncLLMEngine) -> None:
        self.engine = engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pagewire", daemon=True)
        self._thread.start()
        self._closed = False
        atexit.register(self.close)
        try:
            self.run(engine.start())
        except BaseException:
            self.close()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end in the thread; an interrupt here cancels it there. Raises RuntimeError after `close`, and what the work does."""
        if self._closed:
            work.close()
            raise RuntimeError(CLOSED)
        return self._run(work)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Let it run in the thread."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def check(self) -> None:
        """Raise RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError(CLOSED)

    def close(self) -> None:
        """Close the engine and end the thread. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._run(self._leave())
        self.engine.end_services()  # here: at the program's end no executor takes work any more
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _leave(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.engine.leave()


class Program:
    """Base of the blocking engines: a background, and its end."""

    def __init__(self, model: str = "", **settings: Any) -> None:
        self._background = Background(AsyncLLMEngine(model, **settings))

    def close(self) -> None:
        """End the services that were started here. Done at the program's end as well."""
        self._background.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
