"""What one HTTP request waits for: news of its entries, one wake per step however many tokens it brought."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from frontend.entries import Entry
from frontend.errors import ApiError


class Stream:
    """The entries of one HTTP request (one per prompt), and a wake-up for its handler.

    `await news()` returns when something happened: an entry has tokens or ended (`take`), the client has gone
    (`gone`), the server ends the stream (`error`), or nothing has happened for a while (`quiet`).
    """

    def __init__(self, entries: Sequence[Entry], close: Callable[[Stream], None], now: float) -> None:
        self.entries = list(entries)
        self.gone = False
        self.quiet = False
        self.error: ApiError | None = None
        self.woken = now  # when it was last woken, on the loop's clock
        self._close = close
        self._touched: dict[int, Entry] = {}
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether every entry has ended."""
        return all(entry.ended for entry in self.entries)

    def touch(self, entry: Entry, now: float) -> None:
        """Tell the handler that an entry has news."""
        self._touched[entry.handle] = entry
        self.wake(now)

    def wake(self, now: float) -> None:
        """Let `news` return."""
        self.woken = now
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def news(self) -> None:
        """Wait for something to happen; returns at once if it already has."""
        if self._touched or self.gone or self.quiet or self.error is not None:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def end(self) -> None:
        """Wait for all entries to end, or for the client or the server to give up (`gone`, `error`)."""
        while not (self.ended or self.gone or self.error is not None):
            await self.news()
            self.quiet = False
            self._touched.clear()

    def take(self) -> list[Entry]:
        """The entries with news since the last call."""
        touched = list(self._touched.values())
        self._touched.clear()
        return touched

    def leave(self) -> None:
        """The client has gone: stop the work."""
        self.gone = True
        self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Nothing more is to be said: forget the entries, aborting what still runs. Harmless when repeated."""
        self._close(self)
