"""A simulated network: connections between peers and schedulers that delay, lose, repeat, reorder and hold frames.

A connection is what a DEALER and a ROUTER make: it has a route (the ROUTER's name for it), dies with its process or
when its peer closes the socket, and comes back under a new route when a scheduler restarts. Faults are drawn from the
generator that was given, per frame.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.listener import Route
from tests.simulation.clock import Clock

Frames = list[bytes]


@dataclass
class Weather:
    """What happens to frames: seconds of delay, and probabilities."""

    delay: tuple[float, float] = (0.0001, 0.0005)
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0  # a frame overtakes those before it
    detection: tuple[float, float] = (0.01, 0.3)  # until the other side notices a dead connection


@dataclass(eq=False)
class Connection:
    """One socket's connection. `deliver_*` are set by its two ends."""

    peer: str
    scheduler: str
    channel: int
    route: Route
    deliver_to_peer: Callable[[Frames], None]
    open: bool = True
    usable_at: float = 0.0  # a process that is stopped shakes no hands: until then nothing can be sent
    queue_up: float = 0.0  # when the last frame in each direction arrives: TCP keeps order
    queue_down: float = 0.0


@dataclass(eq=False)
class Network:
    """All connections. `schedulers` maps a name to what takes (route, frames) there, while it runs."""

    clock: Clock
    rng: random.Random
    weather: Weather = field(default_factory=Weather)
    schedulers: dict[str, Callable[[Route, Frames], None]] = field(default_factory=dict)
    gone: dict[str, Callable[[Route], None]] = field(default_factory=dict)
    connections: list[Connection] = field(default_factory=list)
    held: dict[tuple[str, str], float] = field(default_factory=dict)  # (from, to) → until when nothing passes
    stopped: dict[str, float] = field(default_factory=dict)  # scheduler → until when its process stands still
    seen: dict[str, int] = field(default_factory=dict)  # what has happened to frames
    _routes: itertools.count[int] = field(default_factory=itertools.count)

    def connect(self, peer: str, scheduler: str, channel: int, socket: int, deliver: Callable[[Frames], None]) -> Connection:
        """Open a peer's socket towards a scheduler, whether it runs or not."""
        connection = Connection(peer, scheduler, channel, self._route(socket), deliver)
        connection.usable_at = self.stopped.get(scheduler, 0.0)
        self.connections.append(connection)
        return connection

    def close(self, connection: Connection) -> None:
        """The peer closes its socket, or dies: what has been sent still arrives, nothing comes back."""
        if connection.open:
            connection.open = False
            self.connections.remove(connection)
            self._notice(connection.scheduler, connection.route)

    def restart(self, scheduler: str) -> list[Connection]:
        """A scheduler's process has ended: its connections break, and return under new routes. Returns them."""
        broken = [c for c in self.connections if c.scheduler == scheduler]
        for connection in broken:
            connection.route = self._route(connection.route[0])
            connection.queue_up = connection.queue_down = self.clock.now
        return broken

    def hold(self, source: str, target: str, until: float) -> None:
        """Hold all bytes from one process to another until a time; the connection stays open."""
        self.held[source, target] = max(until, self.held.get((source, target), 0.0))

    def to_scheduler(self, connection: Connection, frames: Frames) -> None:
        """A peer sends."""
        route = connection.route
        if self.clock.now < connection.usable_at:
            self._count("unsent")
            return
        for delay in self._fate(connection.peer, connection.scheduler):
            arrival, connection.queue_up = self._arrival(delay, connection.queue_up)

            def arrive() -> None:
                take = self.schedulers.get(connection.scheduler)
                if take is not None and connection.route == route:
                    take(route, frames)

            self.clock.at(arrival, arrive)

    def to_peer(self, scheduler: str, route: Route, frames: Frames) -> bool:
        """A scheduler sends; False if the route is gone."""
        connection = next((c for c in self.connections if c.route == route and c.scheduler == scheduler), None)
        if connection is None:
            return False
        for delay in self._fate(scheduler, connection.peer):
            arrival, connection.queue_down = self._arrival(delay, connection.queue_down)

            def arrive() -> None:
                if connection.open and connection.route == route:
                    connection.deliver_to_peer(frames)

            self.clock.at(arrival, arrive)
        return True

    def _route(self, socket: int) -> Route:
        return (socket, b"route-%d" % next(self._routes))

    def _notice(self, scheduler: str, route: Route) -> None:
        def tell() -> None:
            if scheduler in self.gone and scheduler in self.schedulers:
                self.gone[scheduler](route)

        self.clock.after(self.rng.uniform(*self.weather.detection), tell)

    def _fate(self, source: str, target: str) -> list[float]:
        """The delays after which a frame arrives: none if it is lost, two if it is repeated."""
        hold = max(0.0, self.held.get((source, target), 0.0) - self.clock.now)
        delays = []
        for copy in range(2):
            if copy and self.rng.random() >= self.weather.duplication:
                break
            if self.rng.random() < self.weather.loss:
                self._count("lost")
                continue
            if copy:
                self._count("duplicated")
            delays.append(hold + self.rng.uniform(*self.weather.delay))
        if hold:
            self._count("held")
        return delays

    def _arrival(self, delay: float, queue: float) -> tuple[float, float]:
        arrival = self.clock.now + delay
        if self.weather.reordering and self.rng.random() < self.weather.reordering:
            self._count("reordered")
            return arrival + 3 * self.weather.delay[1], queue
        arrival = max(arrival, queue)
        return arrival, arrival

    def _count(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1
