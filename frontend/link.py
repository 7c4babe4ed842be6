"""The journal's link to its schedulers: moves frames and time between the cores, ZeroMQ and the event loop.

The cores (`Dialer`, `Journal`) decide; nothing here does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import zmq

from frontend.journal import Journal
from frontend.settings import FrontendSettings
from frontend.wire import Wire
from protocol.endpoints import check_endpoint
from protocol.keys import client_keys
from protocol.messages import Hello, Tokens
from protocol.rundir import RunDir
from protocol.sessions import Closed, Dialer, Event, Opened, Received, TurnedAway
from protocol.trace import Trace

log = logging.getLogger("frontend")


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


class Link:
    """Runs from `open` to `close`, in one event loop. `pumped(now)` is called whenever the cores had something to do.

    Raises CannotRun for keys or endpoints that cannot be used.
    """

    def __init__(
        self, settings: FrontendSettings, journal: Journal, pumped: Callable[[float], None], recorder: Recorder | None = None
    ) -> None:
        self.refusal = ""  # why a scheduler turned this frontend away; empty if none did
        self.trace = Trace()  # a process puts its publisher's here
        self._settings = settings
        self._journal = journal
        self._pumped = pumped
        self._recorder = recorder
        self._endpoints = settings.schedulers or (RunDir(settings.run_dir).frontends,)
        self._keys = client_keys(settings.key_file, settings.server_key)
        for endpoint in settings.schedulers:
            check_endpoint(endpoint, "--scheduler", self._keys is not None)
        self._timer: asyncio.Handle | None = None
        self._timer_at = math.inf
        self._is_open = self._closing = False

    def open(self) -> None:
        """Begin to look for a scheduler."""
        self._loop = asyncio.get_running_loop()
        hello = Hello(role="frontend", name=self._settings.name, incarnation=self._journal.incarnation, attempt=1)
        counters = self._journal.counters
        self._dialer = Dialer(hello, len(self._endpoints), 1, self._settings.times, counters, self._loop.time())
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._wire = Wire(self._context, self._endpoints, self._received, self._disconnected, self.pump, counters, self._keys)
        self._is_open = True
        self._waiting("a scheduler")
        self._tick()

    async def close(self) -> None:
        """Send what is left, as far as the scheduler can be told, and close all sockets."""
        self._closing = True
        if not self._is_open:
            return
        self.pump()
        if self._dialer.session:
            await asyncio.sleep(0)  # ZeroMQ's own thread sends; LINGER 0 would drop what it has not yet taken
            await asyncio.sleep(0.01)
        if self._timer is not None:
            self._timer.cancel()
        self._wire.close()
        self._context.term()

    def figures(self) -> dict[str, float]:
        """For telemetry."""
        return {
            "session_open": float(self._journal.is_open),
            "link_round_trip_seconds": self._dialer.round_trip,
            "epoch": float(self._dialer.epoch >> 32),
        }

    def pump(self) -> None:
        """Carry out what the cores have decided: renew sockets, send, tell what has news, set the timer."""
        now = self._loop.time()
        while self._journal.out:
            self._dialer.send(self._journal.out.popleft(), now)
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
        self._pumped(now)
        self._arm()

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
                    self._journal.message(event.message, begun)  # finer than the loop's time, which goes by milliseconds
                    if self.trace.on and isinstance(event.message, Tokens):
                        self.trace.note("detokenize", "detokenize", begun, time.monotonic())
                    if self._journal.fault is not None and self._dialer.session:
                        self._handle(self._dialer.fail(0, now, self._journal.fault), now)
                        return
                case Opened():
                    self.refusal = ""
                    self._journal.opened(event.welcome, now)
                    if self._recorder is not None:
                        self._recorder.present("a scheduler")
                case Closed():
                    self._journal.closed(now)
                    if self._recorder is not None and not self._closing:
                        self._recorder.fenced(event.reason)
                    self._waiting("a scheduler")
                case TurnedAway():
                    if self.refusal != event.reason:
                        log.error("a scheduler refuses this frontend: %s", event.reason)
                    self.refusal = event.reason

    def _waiting(self, peers: str) -> None:
        if self._recorder is not None and not self._closing:
            self._recorder.waiting(peers)

    def _tick(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now = self._loop.time()
        self._handle(self._dialer.tick(now), now)
        self._journal.tick(now)
        self.pump()

    def _arm(self) -> None:
        due = min(self._dialer.next_time(), self._journal.next_time())
        if self._closing or due == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = (self._loop.call_at(due, self._tick) if due < math.inf else None), due
