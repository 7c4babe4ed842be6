"""The scheduler's process: one thread, two ROUTER sockets, a poller that blocks while there is nothing to do."""

from __future__ import annotations

import math
import secrets
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import zmq

from protocol.counters import Counters
from protocol.endpoints import check_endpoint
from protocol.keys import AllowList, Authenticator, ServerKeys, read_pair
from protocol.listener import FRONTENDS, ROLES, WORKERS, Route
from protocol.locks import Guard
from protocol.memory import map_large
from protocol.poller import Poller, Source
from protocol.service import CannotRun, Service
from protocol.sockets import Context, Socket, monitor, news, received, router, send
from protocol.tap import Tap
from protocol.telemetry import Publisher
from protocol.tracing import Tracer, tracer
from scheduler_svc import collector
from scheduler_svc.core import Core, Did
from scheduler_svc.models import TRACED
from scheduler_svc.settings import SchedulerSettings

ARRIVALS = 0.001  # seconds spent on frontends' messages between two plans
EXPORTED = 16  # spans of a model noted in one turn
TELEMETRY = 0.9  # seconds after which figures are published, with whatever wakes the loop
TELEMETRY_LATEST = 1.3  # seconds after which it wakes for them


def run(settings: SchedulerSettings) -> None:
    """Run a scheduler until it is asked to stop. Raises CannotRun, RunDirError."""
    map_large()  # anybody may send large frames
    process = Service("scheduler", settings.name, settings.run_dir, settings.log_level, log_format=settings.log_format)
    with process as service, ExitStack() as stack:
        context: Context = zmq.Context()
        stack.callback(context.term)
        endpoints = {
            FRONTENDS: settings.bind_frontends or service.rundir.frontends,
            WORKERS: settings.bind_workers or service.rundir.workers,
        }
        keys = _keys(settings)
        counters = Counters()
        authenticator = None
        if keys is not None:
            authenticator = Authenticator(context, AllowList(settings.allow_file), counters)
            stack.callback(authenticator.close)
        sockets: dict[int, Socket] = {}
        for which, endpoint in endpoints.items():
            check_endpoint(endpoint, f"--bind-{ROLES[which]}s", keys is not None, binds=True)
            stack.enter_context(Guard(endpoint))
            try:
                sockets[which] = router(context, endpoint, keys, ROLES[which])
            except zmq.ZMQError as error:
                raise CannotRun(f"cannot bind {endpoint}: {error.strerror}") from None
            stack.callback(sockets[which].close)
        tap = Tap(service.rundir.tap(settings.name), context)
        stack.callback(tap.close)
        publisher = Publisher(
            settings.telemetry or service.rundir.telemetry, "scheduler", settings.name, service.incarnation, psutil.Process().pid, context
        )
        stack.callback(publisher.close)
        traces = tracer(settings.otlp_traces_endpoint, "scheduler", settings.name, counters)
        if traces is not None:
            stack.callback(traces.close)
        loop = _Loop(settings, service, sockets, authenticator, counters, tap, publisher, traces)
        stack.callback(loop.close)
        loop.run()


class _Loop:
    """The poll loop around a `Core`."""

    def __init__(
        self,
        settings: SchedulerSettings,
        service: Service,
        sockets: dict[int, Socket],
        authenticator: Authenticator | None,
        connections: Counters,
        tap: Tap,
        publisher: Publisher,
        traces: Tracer | None,
    ) -> None:
        self._service = service
        self._sockets = sockets
        self._authenticator = authenticator
        self._connections = connections  # counts who was not let in
        self._tap = tap
        self._publisher = publisher
        self._tracer = traces
        self._process = psutil.Process()
        key_file = Path(settings.hash_key_file) if settings.hash_key_file else None
        self._key_file = key_file
        self.core = Core(
            settings,
            lambda: secrets.randbits(62) | 1,
            service.rundir.claim_epoch,
            self._keep_key,
            time.monotonic(),
            seen_epoch=service.rundir.epoch() << 32,
            hash_key=_read_key(key_file) if key_file else service.rundir.known_hash_key(),
            standby=settings.standby,
        )
        self._monitors = [monitor(socket) for socket in sockets.values()]
        self._poller = Poller()
        self._poller.register(*sockets.values(), *self._monitors, service.stop_fd)
        if authenticator is not None:
            self._poller.register(authenticator.socket)
        self._published = -math.inf
        self._gone: list[Route] = []  # connections that a frame could not be routed to

    def run(self) -> None:
        """Until the service is asked to stop."""
        collector.begin()
        while not self._service.stopping.is_set():
            self._turn(self._poller.wait(min(self.core.next_time(), self._published + TELEMETRY_LATEST) - time.monotonic()))
            self._say_state()
        self._service.state("stopping")
        self._export(TRACED)
        self._publish()

    def close(self) -> None:
        """Close the monitors, without which the context would wait for ever."""
        self._poller.close()
        for socket, watch in zip(self._sockets.values(), self._monitors, strict=True):
            socket.disable_monitor()
            watch.close()

    def _turn(self, ready: set[Source]) -> None:
        """One round: results first, so that plans go out before anything else is looked at."""
        if self._sockets[WORKERS] in ready:
            begun = time.monotonic()
            self._take(WORKERS, float("inf"))
            self._trace(begun)
        now = time.monotonic()
        if self._authenticator is not None and self._authenticator.socket in ready:
            self._authenticator.answer()
        if any(watch in ready for watch in self._monitors):
            self._look_at_connections(now)
        if self._sockets[WORKERS] in ready or self._sockets[FRONTENDS] not in ready:
            self._plan(now)
        if self._sockets[FRONTENDS] in ready:
            self._take(FRONTENDS, now + ARRIVALS)
            now = time.monotonic()
            self._plan(now)
        self._export(EXPORTED)
        if now >= self._published + TELEMETRY:
            self._published = now
            self._publish()

    def _take(self, which: int, until: float) -> None:
        for route, *frames in received(self._sockets[which]):
            self._service.flight.record("in", route.hex(), frames)
            self._tap.mirror("in", frames)
            now = time.monotonic()
            self.core.receive((which, route), frames, now)
            if now >= until:
                return

    def _plan(self, now: float) -> None:
        """Let the core have its turn, and transmit a plan before the next one is made."""
        begun = now

        def transmit() -> None:
            nonlocal begun
            did = self._trace(begun)
            begun = time.monotonic()
            self._transmit()
            ended = time.monotonic()
            for name, lane, key, _ in did:
                if name == "plan":
                    self._publisher.trace.note(lane, "send", begun, ended, key)
            begun = ended

        self.core.turn(now, transmit)
        transmit()
        self._tell_gone()

    def _trace(self, begun: float) -> list[Did]:
        """Note for the timeline what the core has done since `begun`; returns it."""
        if not self.core.done:
            return []
        did, self.core.done = self.core.done, []
        ended = time.monotonic()
        for name, lane, key, since in did:
            self._publisher.trace.note(lane, name, min(since, begun), begun if since < begun else ended, key)
        return did

    def _transmit(self) -> None:
        out = self.core.out
        while out:
            route, frames = out.popleft()
            self._service.flight.record("out", route[1].hex(), frames)
            self._tap.mirror("out", frames)
            self._send(route, frames)

    def _tell_gone(self) -> None:
        """Tell the core which connections have gone; not while it plans for them."""
        while self._gone:
            self.core.disconnected(self._gone.pop(), time.monotonic())
            self._transmit()

    def _send(self, route: Route, frames: list[bytes]) -> None:
        socket = self._sockets[route[0]]
        self._poller.used(socket)
        try:
            if not send(socket, [route[1], *frames]):
                self.core.counters.add("socket_full")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.core.counters.add("route_gone")
            self._gone.append(route)

    def _look_at_connections(self, now: float) -> None:
        changes = [news(watch) for watch in self._monitors]
        if refused := sum(change.refused for change in changes):
            self._connections.add("connection_refused", refused)
        if any(change.lost for change in changes):
            # ROUTER does not say whose connection has gone: a frame for each tells.
            self.core.probe(now)
            self._transmit()
            self._tell_gone()

    def _keep_key(self, key: bytes) -> None:
        if self._key_file is None:
            self._service.rundir.keep_hash_key(key)

    def _say_state(self) -> None:
        if self.core.state != "active":
            self._service.state(self.core.state)
        elif not self.core.has_worker:
            self._service.state("waiting")
            self._service.waiting("a worker")
        else:
            self._service.present("a worker")
            self._service.state("ready")

    def _export(self, most: int) -> None:
        """The queue spans of traced requests that have been admitted, at most so many of a model."""
        if self._tracer is None:
            return
        for model in self.core.engine.models.values():
            traced = model.tally.traced
            for _ in range(min(len(traced), most)):
                trace, arrival, admitted = traced.popleft()
                self._tracer.span("queue", trace, arrival, admitted)

    def _publish(self) -> None:
        counts = (*self.core.counters.items(), *self._connections.items())
        values = {**self.core.engine.stats(), **{f"wire_{name}": float(n) for name, n in counts}}
        values["memory_bytes"] = float(self._process.memory_info().rss)
        values["epoch"] = float(self.core.epochs.epoch >> 32)
        self._publisher.publish(values, self.core.engine.series(), self.core.engine.pictures())
        if self.core.engine.at_rest:
            collector.at_rest()
        if self._publisher.trace.on != (self.core.done is not None):
            self.core.done = [] if self._publisher.trace.on else None


def _keys(settings: SchedulerSettings) -> ServerKeys | None:
    if not settings.key_file and not settings.allow_file:
        return None
    if not settings.key_file or not settings.allow_file:
        raise CannotRun("--key-file and --allow-file belong together: the scheduler's secret key, and the keys it lets in")
    return ServerKeys(read_pair(settings.key_file, "--key-file"))


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise CannotRun(f"--hash-key-file {path}: {error.strerror}") from None
    if len(key) != 16:
        raise CannotRun(f"--hash-key-file {path} must hold 16 bytes, not {len(key)}")
    return key
