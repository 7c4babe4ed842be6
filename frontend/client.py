"""Requests to the models behind a frontend's schedulers, under asyncio.

The journal decides, the link carries; here are the streams of those who ask. The HTTP server and the offline API both
talk to a `Client`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from frontend.entries import Entry, NewRequest
from frontend.errors import ApiError
from frontend.journal import Journal, NotYet
from frontend.link import Link, Recorder
from frontend.request_log import log_end
from frontend.resume import revive
from frontend.settings import FrontendSettings
from frontend.spans import RequestSpans
from frontend.streams import Stream
from frontend.tokenizer import Tokenizer
from frontend.tokenizers import Tokenizers
from frontend.totals import Totals
from protocol.counters import Counters
from protocol.messages import ModelInfo, Submit
from protocol.series import Series

T = TypeVar("T")
TOKENIZER_THREADS = 2


@dataclass(frozen=True)
class Model:
    """A model that can be asked: what its workers announced, and its tokenizer."""

    info: ModelInfo
    tokenizer: Tokenizer


class Client:
    """Submits requests and hands back streams. Lives in one event loop; not thread-safe.

    Raises CannotRun for keys or endpoints that cannot be used; from `start` BundleError or TokenizerError if the
    tokenizer named in the settings cannot be read.
    """

    def __init__(self, settings: FrontendSettings, incarnation: int, recorder: Recorder | None = None) -> None:
        self.settings = settings
        self.incarnation = incarnation
        self.counters = Counters()
        self.journal = Journal(incarnation, settings.times, self.counters, self._revive)
        self.link = Link(settings, self.journal, self._pumped, recorder)
        self.totals = Totals()
        self.spans: RequestSpans | None = None  # a process puts these here if requests are traced
        self._labels: dict[str, str] = {}  # of series, by model
        self._pool = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="tokenize-aside")
        self._tokenizers = Tokenizers(self.journal, self.offload, self._pump, self._tokenizer_settled)
        self._was_open = False
        self.changed: Callable[[], None] = lambda: None  # called when `why_not_ready` may say otherwise; a process puts its own here
        self._streams: set[Stream] = set()

    async def start(self) -> None:
        """Read the tokenizer named in the settings, if any, and begin to look for a scheduler."""
        self._loop = asyncio.get_running_loop()
        if self.settings.tokenizer:
            await self._tokenizers.read(self.settings.tokenizer)
        self.link.open()

    async def stop(self) -> None:
        """Close all sockets. What still runs is aborted first, as far as the scheduler can be told; who waits for it gets an error."""
        self.stop_threads()
        self.end_streams(ApiError(503, "the engine was closed", code="shutting_down"))
        for stream in list(self._streams):
            stream.close()
        self._tokenizers.close()
        await self.link.close()

    def stop_threads(self) -> None:
        """Begin no more of what waits for a thread."""
        for pool in (self._pool, self._aside):
            pool.shutdown(wait=False, cancel_futures=True)

    # ---------------------------------------------------------------- what can be asked

    def why_not_ready(self) -> str:
        """Why requests would have to wait; empty if they need not."""
        if not self.journal.is_open:
            return self.link.refusal or "no scheduler has answered yet"
        models = self.journal.models.values()
        serving = [info for info in models if info.workers_ready]
        if not serving:
            loading = sum(info.workers_loading for info in models)
            return f"{loading} worker(s) still loading" if loading else "no worker is ready"
        if not any(self._tokenizers.of(info) for info in serving):
            return self.why_never_ready() or "the tokenizer is still loading"
        return ""

    def why_never_ready(self) -> str:
        """Why no model that is served now can ever be asked: no tokenizer can be made of their files; empty while one may."""
        reasons = [self._tokenizers.unusable(info) for info in self.journal.models.values() if info.workers_ready]
        return reasons[0] if reasons and all(reasons) else ""

    def models(self) -> list[ModelInfo]:
        """The models known now."""
        return list(self.journal.models.values())

    def public_name(self, info: ModelInfo) -> str:
        """The name under which clients know a model."""
        return self.settings.served_model_name if self.settings.served_model_name and len(self.journal.models) == 1 else info.name

    def model(self, name: str | None) -> Model:
        """A model by its name (None: the first). Raises ApiError: 404 for an unknown one, 503 before it can be asked."""
        models = self.journal.models
        if not models:
            raise ApiError(503, f"not ready: {self.why_not_ready()}", code="not_ready", retry_after=1.0)
        info = next((i for i in models.values() if name in (None, i.name, self.public_name(i))), None)
        if info is None:
            known = ", ".join(self.public_name(i) for i in models.values())
            raise ApiError(404, f"the model {name!r} does not exist; there is {known}", "model", "model_not_found")
        tokenizer = self._tokenizers.of(info)
        if tokenizer is None:
            why = self._tokenizers.unusable(info) or "the tokenizer is still loading"
            raise ApiError(503, f"not ready: {why}", code="not_ready", retry_after=1.0)
        return Model(info, tokenizer)

    async def offload(self, work: Callable[[], T]) -> T:
        """Run tokenizing or template work in a thread, off the event loop."""
        begun = time.monotonic()
        done = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        if self.link.trace.on:
            self.link.trace.note("tokenize", "tokenize", begun, time.monotonic())
        return done

    async def offload_aside(self, work: Callable[[], T]) -> T:
        """Run such work that no prompt shall wait for, in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, work)

    def open(self) -> Stream:
        """A stream of no requests yet. It must be closed in the end (`Stream.close`)."""
        stream = Stream([], self._close, time.monotonic())
        self._streams.add(stream)
        return stream

    def submit(self, requests: Sequence[NewRequest], arrived: float = 0.0, parent: str = "", stream: Stream | None = None) -> Stream:
        """Submit requests that are answered together, with those of an open stream if one is given.

        `arrived`: when the client asked, on the monotonic clock, if that was before now. `parent`: its traceparent.
        """
        stream = stream or self.open()
        now = time.monotonic()  # the loop's own time goes by milliseconds
        for new in requests:
            entry = self._submit(new, arrived or now, parent, now)
            entry.listener = stream
            stream.entries.append(entry)
        self._pump()
        return stream

    def _submit(self, new: NewRequest, arrived: float, parent: str, now: float) -> Entry:
        span = None
        if self.spans is not None:
            new, span = self.spans.begin(new, parent, arrived, now)
        entry = self.journal.submit(new, now)
        entry.arrived, entry.span = arrived, span
        return entry

    def attach(self, requests: Mapping[bytes, Sequence[int]], tenant: str) -> Stream:
        """Take over requests of another frontend, with the tokens of each choice that the client has.

        The entries are empty until they are no longer `attaching`. Raises ApiError (409) if one is answered here.
        """
        now = self._loop.time()
        stream = self.open()
        try:
            for request, told in requests.items():
                entry = self.journal.attach(request, now, told, tenant)
                entry.listener = stream
                stream.entries.append(entry)
        except ValueError:
            stream.close()
            raise ApiError(409, "this frontend still sends that stream", "Last-Event-ID", "stream_open") from None
        self._pump()
        return stream

    def finish(self, entry: Entry) -> None:
        """Everything of an entry has been taken, or nobody waits for it: forget it. Its stream does so in the end; to be told at the
        next turn of the link will do."""
        if entry.finished:
            return
        entry.finished = True
        now = time.monotonic()
        self.totals.ended(entry, now)
        entry.measures.ended(entry, now)
        log_end(entry, now)
        if self.spans is not None and entry.span is not None:
            self.spans.end(entry, now)
        self.journal.done(entry, now)
        if self.link.trace.on:
            self.link.trace.note("requests", "request", entry.submitted, now, entry.request.hex())
            if entry.first_token > 0:
                self.link.trace.note("requests", "first token", entry.first_token, entry.first_token, entry.request.hex())

    def quiet_streams(self, seconds: float) -> None:
        """Wake, with `quiet`, every stream that nothing has happened on for so long."""
        now = self._loop.time()
        for stream in self._streams:
            if now - stream.woken >= seconds:
                stream.quiet = True
                stream.wake(now)

    def end_streams(self, error: ApiError) -> None:
        """End every open stream with an error."""
        now = self._loop.time()
        for stream in list(self._streams):
            stream.error = error
            stream.wake(now)

    def stats(self) -> dict[str, float]:
        """Figures for telemetry: requests by state, tokens, and every counter of the wire."""
        entries = self.journal.entries()
        live = [entry for entry in entries if not entry.ended]
        running = sum(entry.admitted for entry in live)
        return {
            "requests_waiting": len(live) - running,
            "requests_running": running,
            **self.totals.figures(),
            **self.link.figures(),
            **self.counters,
        }

    def series(self) -> list[Series]:
        """Samples of the families of `protocol/families.py`, under the models' public names."""
        return [sample for model, measures in self.journal.measures.items() for sample in measures.series(self._label(model))]

    def served(self) -> dict[str, str]:
        """The models' names in the API, by their own."""
        return {name: self.public_name(info) for name, info in self.journal.models.items()}

    # ---------------------------------------------------------------- inside

    def _label(self, model: str) -> str:
        """The name of a model's series: that of its first, since a running counter must not change its labels."""
        if model not in self._labels:
            name = self.served().get(model, model)
            self._labels[model] = model if name in self._labels.values() else name
        return self._labels[model]

    def _close(self, stream: Stream) -> None:
        if stream not in self._streams:
            return
        self._streams.discard(stream)
        for entry in stream.entries:
            self.finish(entry)
        self._pump()

    def _pump(self) -> None:
        """Let the link carry what the journal has to say."""
        self.link.pump()

    def _pumped(self, now: float) -> None:
        """Wake the streams that have news, and look after the tokenizers of new models."""
        if self.journal.touched:
            touched, self.journal.touched = self.journal.touched, {}
            for entry in touched.values():
                if isinstance(entry.listener, Stream):
                    entry.listener.touch(entry, now)
        changed = self.journal.models_changed or self.journal.is_open != self._was_open
        self._was_open = self.journal.is_open
        self._tokenizers.follow()
        if changed:
            self.changed()

    def _revive(self, submit: Submit) -> NewRequest:
        info = self.journal.models.get(submit.model)
        if info is None:
            raise LookupError(f"the model {submit.model} is not here")
        tokenizer = self._tokenizers.of(info)
        if tokenizer is None:
            if why := self._tokenizers.unusable(info):
                raise LookupError(why)
            raise NotYet
        return revive(submit, tokenizer)

    def _tokenizer_settled(self) -> None:
        self.journal.attach_again()
        self._pump()
        self.changed()
