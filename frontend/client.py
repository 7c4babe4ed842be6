"""A frontend's connection to its schedulers: the link, the journal and the models' tokenizers, under asyncio.

The cores (`Dialer`, `Journal`) decide; this file moves frames and time between them, ZeroMQ and the event loop. The
HTTP server and the offline API both talk to a `Client`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import zmq

from frontend.entries import Entry, NewRequest
from frontend.errors import ApiError
from frontend.fetch import Fetch
from frontend.journal import Journal
from frontend.resume import revive
from frontend.settings import FrontendSettings
from frontend.spans import RequestSpans
from frontend.streams import Stream
from frontend.tokenizer import Tokenizer
from frontend.wire import Wire
from protocol.counters import Counters
from protocol.endpoints import check_endpoint
from protocol.keys import client_keys
from protocol.messages import Hello, ModelInfo, Submit, Tokens
from protocol.rundir import RunDir
from protocol.series import Series
from protocol.sessions import Closed, Dialer, Event, Opened, Received, TurnedAway
from protocol.tokenizer_files import bundle_hash, read_bundle
from protocol.trace import Trace

log = logging.getLogger("frontend")

T = TypeVar("T")
TOKENIZER_THREADS = 2
RETRY_FETCH = 1.0  # seconds until tokenizer files are asked for again


@dataclass(frozen=True)
class Model:
    """A model that can be asked: what its workers announced, and its tokenizer."""

    info: ModelInfo
    tokenizer: Tokenizer


class Recorder(Protocol):
    """Whoever notes what happens on the link: a process's log, tap and flight recorder (`server.ProcessRecorder`)."""

    def frames(self, direction: str, endpoint: str, frames: list[bytes]) -> None:
        """Note frames that arrived ("in") or left ("out")."""

    def fenced(self, reason: str) -> None:
        """Note that a session ended."""

    def waiting(self, peers: str) -> None:
        """Say once that peers are missing."""

    def present(self, peers: str) -> None:
        """Say once that they have come."""


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
        self.totals = Totals()
        self._labels: dict[str, str] = {}  # of series, by model
        self.trace = Trace()  # a process puts its publisher's here
        self.spans: RequestSpans | None = None  # and these if requests are traced
        self._recorder = recorder
        self._endpoints = settings.schedulers or (RunDir(settings.run_dir).frontends,)
        self._keys = client_keys(settings.key_file, settings.server_key)
        for endpoint in settings.schedulers:
            check_endpoint(endpoint, "--scheduler", self._keys is not None)
        self._pool = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._tokenizers: dict[bytes, Tokenizer] = {}
        self._own_tokenizer: Tokenizer | None = None  # of settings.tokenizer, used for every model
        self._building: set[asyncio.Task[None]] = set()
        self._fetches: list[Fetch] = []
        self._streams: set[Stream] = set()
        self._timer: asyncio.Handle | None = None
        self._timer_at = math.inf
        self._started = self._stopped = False
        self._turned_away = ""

    async def start(self) -> None:
        """Read the tokenizer named in the settings, if any, and begin to look for a scheduler."""
        self._loop = asyncio.get_running_loop()
        if self.settings.tokenizer:
            self._own_tokenizer = await self.offload(lambda: Tokenizer.from_bundle(read_bundle(self.settings.tokenizer)))
        hello = Hello(role="frontend", name=self.settings.name, incarnation=self.incarnation, attempt=1)
        self._dialer = Dialer(hello, len(self._endpoints), 1, self.settings.times, self.counters, self._loop.time())
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._wire = Wire(self._context, self._endpoints, self._received, self._disconnected, self._pump, self.counters, self._keys)
        self._started = True
        self._waiting("a scheduler")
        self._tick()

    async def stop(self) -> None:
        """Close all sockets. What still runs is aborted first, as far as the scheduler can be told."""
        self._stopped = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if not self._started:
            return
        for stream in list(self._streams):
            stream.close()
        self._pump()
        if self._dialer.session:
            await asyncio.sleep(0)  # ZeroMQ's own thread sends; LINGER 0 would drop what it has not yet taken
            await asyncio.sleep(0.01)
        if self._timer is not None:
            self._timer.cancel()
        for task in self._building:
            task.cancel()
        self._wire.close()
        self._context.term()

    # ---------------------------------------------------------------- what can be asked

    def why_not_ready(self) -> str:
        """Why requests would have to wait; empty if they need not."""
        if not self.journal.is_open:
            return self._turned_away or "no scheduler has answered yet"
        models = self.journal.models.values()
        if not any(info.workers_ready for info in models):
            loading = sum(info.workers_loading for info in models)
            return f"{loading} worker(s) still loading" if loading else "no worker is ready"
        if not any(info.workers_ready and self._tokenizer(info) for info in models):
            return "the tokenizer is still loading"
        return ""

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
        tokenizer = self._tokenizer(info)
        if tokenizer is None:
            raise ApiError(503, "not ready: the tokenizer is still loading", code="not_ready", retry_after=1.0)
        return Model(info, tokenizer)

    async def offload(self, work: Callable[[], T]) -> T:
        """Run tokenizing or template work in a thread, off the event loop."""
        begun = time.monotonic()
        done = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        if self.trace.on:
            self.trace.note("tokenize", "tokenize", begun, time.monotonic())
        return done

    def submit(self, requests: Sequence[NewRequest], arrived: float = 0.0, parent: str = "") -> Stream:
        """Submit requests that are answered together. Their stream must be closed in the end (`Stream.close`).

        `arrived`: when the client asked, on the monotonic clock, if that was before now. `parent`: its traceparent.
        """
        now = time.monotonic()  # the loop's own time goes by milliseconds
        stream = Stream([self._submit(new, arrived or now, parent, now) for new in requests], self._close, now)
        for entry in stream.entries:
            entry.listener = stream
        self._streams.add(stream)
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
        stream = Stream([], self._close, now)
        self._streams.add(stream)
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
            "requests_finished": self.totals.finished,
            "requests_failed": self.totals.failed,
            "requests_aborted": self.totals.aborted,
            "prompt_tokens": self.totals.prompt_tokens,
            "generation_tokens": self.totals.generation_tokens,
            "request_seconds": self.totals.request_seconds,
            "first_token_seconds": self.totals.first_token_seconds,
            "first_token_requests": self.totals.first_token_requests,
            "later_token_seconds": self.totals.later_token_seconds,
            "later_tokens": self.totals.later_tokens,
            "session_open": float(self.journal.is_open),
            "link_round_trip_seconds": self._dialer.round_trip,
            "epoch": float(self._dialer.epoch >> 32),
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
        now = time.monotonic()
        for entry in stream.entries:
            self.totals.prompt_tokens += entry.prompt_tokens
            self.totals.generation_tokens += sum(len(choice.tokens) for choice in entry.choices)
            if entry.error is not None:
                self.totals.failed += 1
            elif entry.ended and not any(choice.finish_reason == "abort" for choice in entry.choices):
                self.totals.finished += 1
                self.totals.time(entry, now)
            else:
                self.totals.aborted += 1
            entry.measures.ended(entry, now)
            _log_end(entry, now)
            if self.spans is not None and entry.span is not None:
                self.spans.end(entry, now)
            self.journal.done(entry, now)
            if self.trace.on:
                self.trace.note("requests", "request", entry.submitted, now, entry.request.hex())
                if entry.first_token > 0:
                    self.trace.note("requests", "first token", entry.first_token, entry.first_token, entry.request.hex())
        self._pump()

    def _received(self, endpoint: int, frames: list[bytes]) -> None:
        if self._recorder is not None:
            self._recorder.frames("in", self._endpoints[endpoint], frames)
        now = self._loop.time()
        self._handle(self._dialer.receive(endpoint, 0, frames, now), now)

    def _disconnected(self, endpoint: int) -> None:
        now = self._loop.time()
        self._handle(self._dialer.disconnected(endpoint, now), now)

    def _handle(self, events: Sequence[Event], now: float) -> None:
        for event in events:
            match event:
                case Received():
                    begun = time.monotonic()
                    self.journal.message(event.message, begun)  # finer than the loop's time, which goes by milliseconds
                    if self.trace.on and isinstance(event.message, Tokens):
                        self.trace.note("detokenize", "detokenize", begun, time.monotonic())
                    if self.journal.fault is not None and self._dialer.session:
                        self._handle(self._dialer.fail(0, now, self.journal.fault), now)
                        return
                case Opened():
                    self._turned_away = ""
                    self.journal.opened(event.welcome, now)
                    if self._recorder is not None:
                        self._recorder.present("a scheduler")
                case Closed():
                    self.journal.closed(now)
                    if self._recorder is not None and not self._stopped:
                        self._recorder.fenced(event.reason)
                    self._waiting("a scheduler")
                case TurnedAway():
                    if self._turned_away != event.reason:
                        log.error("a scheduler refuses this frontend: %s", event.reason)
                    self._turned_away = event.reason

    def _revive(self, submit: Submit) -> NewRequest:
        info = self.journal.models.get(submit.model)
        tokenizer = self._tokenizer(info) if info is not None else None
        if tokenizer is None:
            raise LookupError(f"the tokenizer of {submit.model} is not here yet")
        return revive(submit, tokenizer)

    def _waiting(self, peers: str) -> None:
        if self._recorder is not None and not self._stopped:
            self._recorder.waiting(peers)

    def _tick(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now = self._loop.time()
        self._handle(self._dialer.tick(now), now)
        self.journal.tick(now)
        self._pump()

    def _pump(self) -> None:
        """Carry out what the cores have decided: renew sockets, send, wake streams, set the timer."""
        now = self._loop.time()
        while self.journal.out:
            self._dialer.send(self.journal.out.popleft(), now)
        for endpoint, _ in self._dialer.reopen:
            self._wire.renew(endpoint)
        self._dialer.reopen.clear()
        out = self._dialer.out[0]
        used = set()
        while out:
            endpoint, frames = out.popleft()
            if self._recorder is not None:
                self._recorder.frames("out", self._endpoints[endpoint], frames)
            self._wire.send(endpoint, frames)
            used.add(endpoint)
        for endpoint in used:
            self._wire.sent(endpoint)
        if self.journal.touched:
            touched, self.journal.touched = self.journal.touched, {}
            for entry in touched.values():
                if isinstance(entry.listener, Stream):
                    entry.listener.touch(entry, now)
        if self.journal.models_changed:
            self.journal.models_changed = False
            self._want_tokenizers()
        if self._fetches and any(fetch.over for fetch in self._fetches):
            self._take_fetches()
        self._arm()

    def _arm(self) -> None:
        due = min(self._dialer.next_time(), self.journal.next_time())
        if self._stopped or due == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = (self._loop.call_at(due, self._tick) if due < math.inf else None), due

    def _tokenizer(self, info: ModelInfo) -> Tokenizer | None:
        return self._own_tokenizer or self._tokenizers.get(info.tokenizer)

    def _want_tokenizers(self) -> None:
        if self._own_tokenizer is not None:
            return
        for info in self.journal.models.values():
            if info.tokenizer not in self._tokenizers and info.workers_ready:
                fetch = self.journal.fetch(info.tokenizer)
                if fetch not in self._fetches:
                    self._fetches.append(fetch)
        if self.journal.out:
            self._loop.call_soon(self._pump)

    def _take_fetches(self) -> None:
        over = [fetch for fetch in self._fetches if fetch.over]
        self._fetches = [fetch for fetch in self._fetches if not fetch.over]
        for fetch in over:
            task = self._loop.create_task(self._build(fetch))
            self._building.add(task)
            task.add_done_callback(self._building.discard)

    async def _build(self, fetch: Fetch) -> None:
        """Make the tokenizer of a bundle that has arrived; if it cannot be had, ask again after a while."""
        try:
            if fetch.bundle is None:
                raise ValueError(fetch.failed)
            bundle = fetch.bundle
            if bundle_hash(bundle) != fetch.tokenizer:
                raise ValueError("their hash is not the one that the worker announced")
            self._tokenizers[fetch.tokenizer] = await self.offload(lambda: Tokenizer.from_bundle(bundle))
        except ValueError as error:
            log.error("the tokenizer files cannot be used: %s", error)
            await asyncio.sleep(RETRY_FETCH)
            self._want_tokenizers()


def _log_end(entry: Entry, now: float) -> None:
    """One line for each request: what failed for a reason of ours is a warning, anything else is for debugging."""
    error = entry.error
    level = logging.WARNING if error is not None and error.status >= 500 else logging.DEBUG
    if log.isEnabledFor(level):
        extra = {
            "request": entry.request.hex(),
            "model": entry.new.model,
            "tenant": entry.new.tenant,
            "prompt_tokens": entry.prompt_tokens,
            "completion_tokens": sum(len(choice.tokens) for choice in entry.choices),
            "finish": ",".join(entry.endings),
            "seconds": round(now - entry.arrived, 6),
        }
        if error is not None:
            extra |= {"status": error.status, "code": error.code, "reason": error.reason}
        log.log(level, "request failed" if error is not None else "request ended", extra=extra)


@dataclass
class Totals:
    """Of requests that are done, since the start."""

    finished: int = 0
    failed: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    request_seconds: float = 0.0  # from the request's arrival to its last token, of the finished ones
    first_token_seconds: float = 0.0  # from the request's arrival to the first token, of the finished ones
    first_token_requests: int = 0
    later_token_seconds: float = 0.0  # from the first token to the last of each of their choices
    later_tokens: int = 0  # and the tokens behind each choice's first

    def time(self, entry: Entry, now: float) -> None:
        """Count the times of a finished request. It ended with its last token, or `now` if it had none of a time known."""
        self.request_seconds += (max((choice.at for choice in entry.choices), default=0.0) or now) - entry.arrived
        if entry.first_token > 0:
            self.first_token_seconds += entry.first_token - entry.arrived
            self.first_token_requests += 1
            self.later_token_seconds += sum(choice.at - entry.first_token for choice in entry.choices if choice.at)
            self.later_tokens += sum(max(0, len(choice.tokens) - 1) for choice in entry.choices)
