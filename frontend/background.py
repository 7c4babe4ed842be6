"""An engine in a thread of its own, for programs without an event loop."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

from frontend.async_engine import CLOSED, AsyncLLMEngine, RequestFailed

T = TypeVar("T")


class Background:
    """An `AsyncLLMEngine` in a thread of its own, for programs without an event loop."""

    def __init__(self, engine: AsyncLLMEngine) -> None:
        self.engine = engine
        self._process = os.getpid()  # a fork has no such thread: whoever waited for it there would wait for ever
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
        """Run to the end in the thread; an interrupt here cancels it there. Raises as `check`, and what the work does."""
        try:
            self.check()
        except RuntimeError:
            work.close()
            raise
        return self._run(work)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:  # by `close`, in another thread
            raise RequestFailed("the engine was closed") from None
        except BaseException:
            future.cancel()
            raise

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Let it run in the thread."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def check(self) -> None:
        """Raise RuntimeError after `close`, and in a fork."""
        self.check_process()
        if self._closed:
            raise RuntimeError(CLOSED)

    def check_process(self) -> None:
        """Raise RuntimeError in a fork of the process that made the engine."""
        if os.getpid() != self._process:
            raise RuntimeError(f"the engine belongs to process {self._process}, of which this one is a fork")

    def close(self) -> None:
        """Close the engine and end the thread. Harmless when repeated, and in a fork."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._run(self._leave())
        self.engine.end_services()  # here: at the program's end no executor takes work any more
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def let_go(self) -> None:
        """Close, as nobody has the engine any more; in a thread, since the last who had it may have been this one's own."""
        if not self._closed and os.getpid() == self._process:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                # Begun by the loop: this thread may be a collector's guest, who holds locks that beginning a thread takes.
                self._loop.call_soon_threadsafe(threading.Thread(target=self.close, name="pagewire-close").start)

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
        weakref.finalize(self, self._background.let_go).atexit = False  # the background sees to that

    def close(self) -> None:
        """End the services that were started here. Done as well when nobody has the engine any more, and at the program's end."""
        self._background.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
