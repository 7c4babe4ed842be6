"""The scheduler's process: one thread, two ROUTER sockets, a poller that blocks while there is nothing to do."""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import zmq

from protocol.listener import FRONTENDS, WORKERS, Route
from protocol.rundir import Guard
from protocol.service import CannotRun, Service
from protocol.sockets import Context, Socket, lost, monitor, received, router, send
from protocol.tap import Tap
from protocol.telemetry import Publisher
from scheduler_svc.core import Core
from scheduler_svc.settings import SchedulerSettings

ARRIVALS = 0.001  # seconds spent on frontends' messages between two plans
TELEMETRY = 1.0  # seconds between two publications


def run(settings: SchedulerSettings) -> None:
    """Run a scheduler until it is asked to stop. Raises CannotRun, RunDirError."""
    with Service("scheduler", settings.name, settings.run_dir, settings.log_level) as service, ExitStack() as stack:
        context: Context = zmq.Context()
        stack.callback(context.term)
        endpoints = {
            FRONTENDS: settings.bind_frontends or service.rundir.frontends,
            WORKERS: settings.bind_workers or service.rundir.workers,
        }
        sockets: dict[int, Socket] = {}
        for which, endpoint in endpoints.items():
            stack.enter_context(Guard(endpoint))
            try:
                sockets[which] = router(context, endpoint)
            except zmq.ZMQError as error:
                raise CannotRun(f"cannot bind {endpoint}: {error.strerror}") from None
            stack.callback(sockets[which].close)
        tap = Tap(service.rundir.tap(settings.name), context)
        stack.callback(tap.close)
        publisher = Publisher(
            settings.telemetry or service.rundir.telemetry, "scheduler", settings.name, service.incarnation, psutil.Process().pid, context
        )
        stack.callback(publisher.close)
        loop = _Loop(settings, service, sockets, tap, publisher)
        stack.callback(loop.close)
        loop.run()


class _Loop:
    """The poll loop around a `Core`."""

    def __init__(self, settings: SchedulerSettings, service: Service, sockets: dict[int, Socket], tap: Tap, publisher: Publisher) -> None:
        self._service = service
        self._sockets = sockets
        self._tap = tap
        self._publisher = publisher
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
        self._poller = zmq.Poller()
        for socket in (*sockets.values(), *self._monitors, service.stop_fd):
            self._poller.register(socket, zmq.POLLIN)
        self._publish_at = 0.0

    def run(self) -> None:
        """Until the service is asked to stop."""
        while not self._service.stopping.is_set():
            wait = min(self.core.next_time(), self._publish_at) - time.monotonic()
            self._poller.poll(max(0, int(wait * 1000) + 1) if wait > 0 else 0)
            self._turn()
            self._say_state()
        self._service.state("stopping")

    def close(self) -> None:
        """Close the monitors, without which the context would wait for ever."""
        for socket, watch in zip(self._sockets.values(), self._monitors, strict=True):
            socket.disable_monitor()
            watch.close()

    def _turn(self) -> None:
        self._take(WORKERS, float("inf"))
        now = time.monotonic()
        if sum(lost(m) for m in self._monitors):  # reads every one of them
            self._probe(now)
        self.core.turn(now)
        self._transmit()
        self._take(FRONTENDS, now + ARRIVALS)
        now = time.monotonic()
        self.core.turn(now)
        self._transmit()
        if now >= self._publish_at:
            self._publish_at = now + TELEMETRY
            self._publish()

    def _take(self, which: int, until: float) -> None:
        for route, *frames in received(self._sockets[which]):
            self._service.flight.record("in", route.hex(), frames)
            self._tap.mirror("in", frames)
            now = time.monotonic()
            self.core.receive((which, route), frames, now)
            if now >= until:
                return

    def _transmit(self) -> None:
        out = self.core.out
        while out:
            route, frames = out.popleft()
            self._service.flight.record("out", route[1].hex(), frames)
            self._tap.mirror("out", frames)
            self._send(route, frames)

    def _send(self, route: Route, frames: list[bytes]) -> None:
        try:
            if not send(self._sockets[route[0]], [route[1], *frames]):
                self.core.counters.add("socket_full")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.core.counters.add("route_gone")
            self.core.disconnected(route, time.monotonic())

    def _probe(self, now: float) -> None:
        """A connection has gone, and ROUTER does not say whose: a frame for each tells."""
        self.core.probe(now)
        self._transmit()

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

    def _publish(self) -> None:
        values = {**self.core.engine.stats(), **{f"wire_{name}": float(n) for name, n in self.core.counters.items()}}
        values["memory_bytes"] = float(self._process.memory_info().rss)
        self._publisher.publish(values)


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise CannotRun(f"--hash-key-file {path}: {error.strerror}") from None
    if len(key) != 16:
        raise CannotRun(f"--hash-key-file {path} must hold 16 bytes, not {len(key)}")
    return key
