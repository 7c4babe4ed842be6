"""The tokenizers of the models that a frontend knows: fetched from a worker through the journal, or one read from a path."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from frontend.fetch import Fetch
from frontend.journal import Journal
from frontend.tokenizer import Tokenizer
from frontend.vocabulary import TokenizerError
from protocol.messages import ModelInfo
from protocol.tokenizer_files import bundle_hash, read_bundle

log = logging.getLogger("frontend")

RETRY_FETCH = 1.0  # seconds until tokenizer files are asked for again

Offload = Callable[[Callable[[], Tokenizer]], Awaitable[Tokenizer]]


class Tokenizers:
    """Kept by the hash of their files.

    `offload` runs work in a thread; `pump` sends what the journal was asked for; `settled` is called when one is here,
    or never will be.
    """

    def __init__(self, journal: Journal, offload: Offload, pump: Callable[[], None], settled: Callable[[], None]) -> None:
        self._journal = journal
        self._offload = offload
        self._pump = pump
        self._settled = settled
        self._own: Tokenizer | None = None  # read from a path, used for every model
        self.by_hash: dict[bytes, Tokenizer] = {}  # those that are here
        self._unusable: dict[bytes, str] = {}  # files that arrived whole and are no tokenizer: why
        self._building: dict[bytes, asyncio.Task[None]] = {}  # of files that have arrived, or wait to be asked for again
        self._fetches: list[Fetch] = []
        self._closed = False

    async def read(self, path: str) -> None:
        """Use the tokenizer at `path` for every model. Raises BundleError or TokenizerError if it cannot be read."""
        self._own = await self._offload(lambda: Tokenizer.from_bundle(read_bundle(path)))

    def of(self, info: ModelInfo) -> Tokenizer | None:
        """The tokenizer of a model; None while it is not here yet."""
        return self._own or self.by_hash.get(info.tokenizer)

    def unusable(self, info: ModelInfo) -> str:
        """Why a model will never have a tokenizer; empty if it has one or may get it."""
        return "" if self.of(info) is not None else self._unusable.get(info.tokenizer, "")

    def follow(self) -> None:
        """Ask for what new models need, and build what has arrived; to be called when the journal has news."""
        if self._closed:
            return
        if self._journal.models_changed:
            self._journal.models_changed = False
            self._want()
        if self._fetches and any(fetch.over for fetch in self._fetches):
            self._take()

    def close(self) -> None:
        """Stop building, for good."""
        self._closed = True
        for task in self._building.values():
            task.cancel()

    def _want(self) -> None:
        if self._own is not None:
            return
        for info in self._journal.models.values():
            known = (self.by_hash, self._unusable, self._building)
            if info.workers_ready and not any(info.tokenizer in those for those in known):
                fetch = self._journal.fetch(info.tokenizer)
                if fetch not in self._fetches:
                    self._fetches.append(fetch)
        if self._journal.out:
            asyncio.get_running_loop().call_soon(self._pump)

    def _take(self) -> None:
        over = [fetch for fetch in self._fetches if fetch.over]
        self._fetches = [fetch for fetch in self._fetches if not fetch.over]
        for fetch in over:
            self._building[fetch.tokenizer] = asyncio.get_running_loop().create_task(self._build(fetch))

    async def _build(self, fetch: Fetch) -> None:
        """Make the tokenizer of a bundle that has arrived; if it did not arrive whole, ask again after a while."""
        try:
            if fetch.bundle is None:
                raise ValueError(fetch.failed)
            bundle = fetch.bundle
            if bundle_hash(bundle) != fetch.tokenizer:
                raise ValueError("their hash is not the one that the worker announced")
            self.by_hash[fetch.tokenizer] = await self._offload(lambda: Tokenizer.from_bundle(bundle))
            self._settled()
        except TokenizerError as error:
            log.error("the tokenizer files cannot be used: %s", error)
            self._unusable[fetch.tokenizer] = f"the tokenizer files cannot be used: {error}"
            self._settled()
        except ValueError as error:
            log.error("the tokenizer files have not arrived: %s", error)
            await asyncio.sleep(RETRY_FETCH)
        finally:
            del self._building[fetch.tokenizer]
        self._want()
