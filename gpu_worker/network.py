"""The worker's network thread: all its sockets, its sessions, and the only clock that others judge it by.

Plans are taken off the link and acknowledged here, whatever the main thread is doing: a long step on a CPU, or the
loading of a model, must not look like a dead link. What arrives goes to the main thread through `inbox`, in order;
what is to be sent comes from any thread through `send`, `fail` and `loaded`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from math import inf
from queue import SimpleQueue

import psutil
import zmq

from gpu_worker.core import file_chunk
from gpu_worker.figures import Figures
from gpu_worker.hang import HangWatch
from gpu_worker.inbox import Item, PlanArrived, SessionClosed, SessionOpened, Stop
from gpu_worker.runner import Description, Runner
from gpu_worker.settings import WorkerSettings
from gpu_worker.spans import RequestSpans
from gpu_worker.wire import CHANNELS, Wire
from protocol.counters import Counters
from protocol.endpoints import check_endpoint
from protocol.keys import client_keys
from protocol.messages import Drained, FileRequest, Hello, Message, Phase, Plan, Progress, Ready, Result
from protocol.service import EXIT_FAILED, Service
from protocol.sessions import Closed, Dialer, Event, Opened, Received, TurnedAway
from protocol.sockets import Context
from protocol.tap import Tap
from protocol.telemetry import Publisher
from protocol.tracing import tracer

DRAINING_SINCE = 2  # the protocol's version
TELEMETRY = 0.9  # seconds after which figures are published, with whatever wakes the thread
TELEMETRY_LATEST = 1.3  # seconds after which it wakes for them


class Network(threading.Thread):
    """Runs from `open()` to `close()`. `session` is the open session, 0 for none; any thread may read it."""

    def __init__(self, settings: WorkerSettings, service: Service, runner: Runner) -> None:
        super().__init__(name="network", daemon=True)
        self.inbox: SimpleQueue[Item] = SimpleQueue()
        self.session = 0
        self._settings = settings
        self._service = service
        self._runner = runner
        self._counters = Counters()
        self._figures = Figures()
        self._spans: RequestSpans | None = None
        self._description: Description | None = None
        self._endpoints = settings.schedulers or (service.rundir.workers,)
        self._keys = client_keys(settings.key_file, settings.server_key)
        for endpoint in settings.schedulers:
            check_endpoint(endpoint, "--scheduler", self._keys is not None)
        hello = Hello(role="worker", name=settings.name, incarnation=service.incarnation, attempt=1)
        self._dialer = Dialer(hello, len(self._endpoints), CHANNELS, settings.times, self._counters, time.monotonic())
        self._calls: deque[Callable[[], None]] = deque()
        self._opened: SimpleQueue[Exception | None] = SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._stop_seen = False
        self._ready = False  # READY has been said in this session
        self._protocol = 0
        self._refusal = ""
        self._planned = self._answered = 0  # newest plan and newest result of the session
        self._progress_at = inf
        self._hang = HangWatch(runner, settings.times.progress)
        self._published = -inf
        self._began = time.monotonic()

    # ------------------------------------------------------------ for other threads

    def open(self) -> None:
        """Start the thread; returns once it has its sockets. Raises CannotRun, RunDirError."""
        self.start()
        if (error := self._opened.get()) is not None:
            raise error

    def send(self, session: int, message: Message) -> None:
        """Send on a session; if it is over by then, the message goes nowhere, counted."""
        self._call(partial(self._send, session, message))

    def fail(self, session: int, step: int, reason: str) -> None:
        """End a session because `step` raised; the next HELLO names both."""
        self._call(partial(self._fail, session, step, reason))

    def loaded(self, description: Description) -> None:
        """The runner is loaded: plans can be checked from now on, and files served."""
        self._call(partial(self._loaded, description))

    def settled(self) -> None:
        """Nothing of an ended session runs any more."""
        self._call(self._hang.end)

    def close(self) -> None:
        """Send what has been handed over, close all sockets, and wait for that."""
        self._call(self._close)
        self.join()

    def _call(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        os.eventfd_write(self._wake_fd, 1)

    # ------------------------------------------------------------ the thread

    def run(self) -> None:
        """The thread: an error in it is handed to the main thread."""
        try:
            with ExitStack() as stack:
                try:
                    self._open(stack)
                except Exception as error:
                    self._opened.put(error)
                    return
                self._opened.put(None)
                while not self._closing:
                    self._turn()
                self._publish()
        except Exception as error:
            self.inbox.put(Stop(error))

    def _open(self, stack: ExitStack) -> None:
        context: Context = zmq.Context()
        stack.callback(context.term)
        rundir = self._service.rundir
        tap = Tap(rundir.tap(self._settings.name), context)
        stack.callback(tap.close)
        telemetry = self._settings.telemetry or rundir.telemetry
        self._publisher = Publisher(telemetry, "worker", self._settings.name, self._service.incarnation, os.getpid(), context)
        stack.callback(self._publisher.close)
        self.trace = self._publisher.trace
        traces = tracer(self._settings.otlp_traces_endpoint, "worker", self._settings.name, self._counters)
        if traces is not None:
            stack.callback(traces.close)
            self._spans = RequestSpans(traces)
        self._process = psutil.Process()
        watched = (self._wake_fd, self._service.stop_fd, self._service.drain_fd)
        self._wire = Wire(context, self._endpoints, watched, tap, self._service.flight, self._counters, self._keys)
        stack.callback(self._wire.close)
        self._say_state()

    def _turn(self) -> None:
        tick_at = self._dialer.next_time()
        wait = min(tick_at, self._progress_at, self._hang.at, self._published + TELEMETRY_LATEST) - time.monotonic()
        self._wire.wait(wait)
        if self._wire.is_ready(self._wake_fd):
            os.eventfd_read(self._wake_fd)
        if not self._stop_seen and self._wire.is_ready(self._service.stop_fd):
            self._stop_seen = True
            self._wire.unwatch(self._service.stop_fd)
            self._service.state("stopping")
            self.inbox.put(Stop())
        if self._wire.is_ready(self._service.drain_fd):
            self._wire.unwatch(self._service.drain_fd)
            self._leave()
        while self._calls:
            self._calls.popleft()()
        for endpoint, channel, frames in self._wire.arrived():
            if frames is None:
                self._happened(self._dialer.disconnected(endpoint, time.monotonic()))
            else:
                self._happened(self._dialer.receive(endpoint, channel, frames, time.monotonic()))
        now = time.monotonic()
        if now >= self._progress_at:
            self._report_progress(now)
        if now >= self._hang.at:
            self._judge_step(now)
        if now >= tick_at:
            self._happened(self._dialer.tick(now))
        if now >= self._published + TELEMETRY:
            self._published = now
            self._publish()
        self._transmit()

    def _transmit(self) -> None:
        for endpoint, channel in self._dialer.reopen:
            self._wire.renew(endpoint, channel)
        self._dialer.reopen.clear()
        for channel, out in enumerate(self._dialer.out):
            while out:
                endpoint, frames = out.popleft()
                if not self._wire.send(endpoint, channel, frames):
                    self._counters.add("socket_full")

    # ------------------------------------------------------------ sessions

    def _happened(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Received(message):
                    self._take(message)
                case Opened(welcome):
                    self.session = welcome.session
                    self._protocol = welcome.protocol
                    self._planned = self._answered = 0
                    self._refusal = ""
                    if self._description is None:
                        self._dialer.send(Phase("loading"), time.monotonic())
                    self._service.present("a scheduler")
                    self._say_state()
                    self.inbox.put(SessionOpened(welcome.session, welcome.hash_key))
                case Closed(session, reason):
                    self.session = 0
                    self._ready = False
                    self._progress_at = inf
                    if self._service.draining.is_set():
                        self._service.request_stop()  # what it had has gone with the session
                    self._hang.begin(time.monotonic())
                    if not self._stop_seen:
                        self._service.fenced(reason)
                        self._say_state()
                    self.inbox.put(SessionClosed(session))
                    if self._spans is not None:
                        self._spans.closed()
                case TurnedAway(reason, endpoint):
                    if reason != self._refusal:
                        self._service.log.error("the scheduler at %s refuses this worker: %s", self._endpoints[endpoint], reason)
                    self._refusal = reason

    def _take(self, message: Message) -> None:
        match message:
            case Plan():
                device_waits = self._planned == self._answered
                if device_waits:
                    self._progress_at = time.monotonic() + self._settings.times.heartbeat
                self._planned = message.step
                if self.trace.on:
                    now = time.monotonic()
                    self.trace.note("network", "receive", now, now, f"{self.session}:{message.step}")
                self.inbox.put(PlanArrived(self.session, message))
                if device_waits:
                    time.sleep(0)  # lets go of the interpreter: the main thread begins the step while this one acknowledges
                if self._spans is not None:
                    self._spans.planned(message, time.monotonic())
            case Drained():
                self._service.log.info("drained")
                self._service.request_stop()
            case FileRequest():
                self._dialer.send(file_chunk(self._description, message), time.monotonic())
            case _:
                self._counters.add("message_unexpected")

    def _send(self, session: int, message: Message) -> None:
        if session != self.session:
            self._counters.add("session_stale_unsent")
            return
        now = time.monotonic()
        self._dialer.send(message, now)
        if self.trace.on and isinstance(message, Result):
            self.trace.note("network", "answer", now, time.monotonic(), f"{session}:{message.step}")
        if isinstance(message, Ready):
            self._ready = True
            if self._service.draining.is_set():
                self._leave()
        elif isinstance(message, Result):
            self._answered = message.step
            self._progress_at = now + self._settings.times.heartbeat if self._planned > message.step else inf
            self._figures.count(message)
            if self._spans is not None:
                self._spans.answered(message, now)

    def _report_progress(self, now: float) -> None:
        """Work is outstanding and no result came lately: say whether the running step still moves."""
        self._progress_at = now + self._settings.times.heartbeat
        self._dialer.send(Progress(self._answered + 1, self._runner.counter), now)

    def _judge_step(self, now: float) -> None:
        """The session is over and its last step still runs. If it hangs, only a new process can serve again."""
        if self._description is None:
            self._hang.begin(now)
        elif self._hang.hangs(now):
            dump = self._service.flight.dump("hung step")
            self._service.log.critical("a step hangs: the process ends; stacks and flight recorder: %s", dump)
            signal.raise_signal(signal.SIGUSR1)  # all stacks, into the log
            os._exit(EXIT_FAILED)

    def _leave(self) -> None:
        """Ask the scheduler to take away what it has given; without one that understands, or anything given, just go."""
        if not self._ready or self._protocol < DRAINING_SINCE:
            self._service.request_stop()
            return
        self._service.log.info("draining")
        self._service.state("draining")
        self._dialer.send(Phase("draining"), time.monotonic())

    def _fail(self, session: int, step: int, reason: str) -> None:
        if session == self.session:
            self._happened(self._dialer.fail(step, time.monotonic(), reason))

    def _loaded(self, description: Description) -> None:
        self._description = description
        self._dialer.geometry = description.geometry
        self._say_state()

    def _close(self) -> None:
        self._transmit()
        self._closing = True

    # ------------------------------------------------------------ what others see

    def _say_state(self) -> None:
        if self._stop_seen or self._service.draining.is_set():
            return
        if self._description is None:
            self._service.state("loading")
        elif self.session:
            self._service.state("ready")
        else:
            self._service.state("waiting")
        if not self.session:
            self._service.waiting("a scheduler")

    def _publish(self) -> None:
        self._publisher.publish(
            {
                "worker_loaded": float(self._description is not None),
                "worker_session_open": float(self.session != 0),
                "worker_plans_in_flight": float(self._planned - self._answered),
                **self._figures.values(),
                "worker_seconds": time.monotonic() - self._began,
                "worker_link_round_trip_seconds": self._dialer.round_trip,
                "epoch": float(self._dialer.epoch >> 32),
                "memory_bytes": float(self._process.memory_info().rss),
                **{f"wire_{name}": float(n) for name, n in self._counters.items()},
            }
        )
