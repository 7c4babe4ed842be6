"""Sessions, the side that listens: a scheduler, and every peer that has said HELLO. No I/O, no clock.

The `Listener` keeps a link per session and knows over which route (a ROUTER's name for a connection) it runs. It does
not decide who is welcome: a HELLO becomes `Greeted`, and the owner answers with `welcome` or `refuse`, now or later.
A frame counts only on the route its session was opened on: a connection that broke and came back is a new route, so
what it still holds of the old session is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from protocol.codec import decode, decode_header, encode
from protocol.columns import BadMessage
from protocol.counters import Counters
from protocol.links import Link
from protocol.messages import PROTOCOL, Geometry, Hello, Join, Message, Ready, Refused, Stale, Welcome
from protocol.sessions import UNSEQUENCED
from protocol.times import Times

FRONTENDS, WORKERS = 0, 1  # the two ROUTER sockets
ROLES = {FRONTENDS: "frontend", WORKERS: "worker"}

Route = tuple[int, bytes]  # (socket, the ROUTER's name of the connection)


@dataclass(frozen=True, slots=True)
class Greeted:
    """A peer asks for a session. Answer with `Listener.welcome` or `refuse`, or let it wait: it repeats itself."""

    route: Route
    hello: Hello


@dataclass(frozen=True, slots=True)
class PeerMessage:
    """A message of an open session, checked."""

    session: int
    message: Message


@dataclass(frozen=True, slots=True)
class PeerClosed:
    """A session is over."""

    session: int
    reason: str
    hello: Hello


@dataclass(frozen=True, slots=True)
class Outdated:
    """A peer has seen a higher epoch than ours."""

    epoch: int


PeerEvent = Greeted | PeerMessage | PeerClosed | Outdated


@dataclass(slots=True)
class Peer:
    """An open session and the peer behind it."""

    hello: Hello
    welcome: Welcome
    route: Route
    link: Link
    joined: Route | None = None  # a worker's results connection
    geometry: Geometry | None = None

    @property
    def role(self) -> str:
        return self.hello.role


@dataclass(slots=True)
class Listener:
    """The scheduler's side of all sessions. Feed it frames and the time; transmit what stands in `out`."""

    times: Times
    counters: Counters
    entropy: Callable[[], int]  # 63 random bits
    peers: dict[int, Peer] = field(default_factory=dict)  # by session
    out: deque[tuple[Route, list[bytes]]] = field(default_factory=deque)
    _by_route: dict[Route, int] = field(default_factory=dict)
    _expected: float = inf

    def welcome(self, greeted: Greeted, epoch: int, hash_key: bytes, credit: int, now: float) -> tuple[int, list[PeerEvent]]:
        """Open a session for a peer; returns its id, and the end of the session this incarnation had, if any."""
        events = self._supersede(greeted.hello, now)
        session = self.entropy()
        welcome = Welcome(greeted.hello.attempt, session, epoch, hash_key, credit, min(greeted.hello.protocol, PROTOCOL))
        link = Link(session, self.times, self.counters, now, leads=True)
        self.peers[session] = Peer(greeted.hello, welcome, greeted.route, link)
        self._by_route[greeted.route] = session
        self.out.append((greeted.route, [UNSEQUENCED, encode(welcome)]))
        return session, events

    def refuse(self, greeted: Greeted, reason: str) -> None:
        """Answer a HELLO with REFUSED."""
        self.counters.add("session_refused")
        self.out.append((greeted.route, [UNSEQUENCED, encode(Refused(greeted.hello.attempt, reason))]))

    def send(self, session: int, message: Message, now: float, weight: int = 0) -> None:
        """Send on a session; on one that is over the message is dropped, counted."""
        peer = self.peers.get(session)
        if peer is None:
            self.counters.add("session_none_dropped")
            return
        self.out.extend((peer.route, frames) for frames in peer.link.send(encode(message), weight, now))

    def unacked(self, session: int) -> int:
        """Weight of what has been sent on a session and not been taken off its link."""
        peer = self.peers.get(session)
        return peer.link.sender.weight if peer else 0

    def close(self, session: int, reason: str) -> list[PeerEvent]:
        """End a session. The peer hears nothing more of it and opens another."""
        peer = self.peers.pop(session, None)
        if peer is None:
            return []
        for route in (peer.route, peer.joined):
            if route is not None:
                self._by_route.pop(route, None)
        self.counters.add("session_closed")
        return [PeerClosed(session, reason, peer.hello)]

    def receive(self, route: Route, frames: list[bytes], now: float) -> list[PeerEvent]:
        """Take what arrived on a route. Bad frames are counted and dropped."""
        try:
            header = decode_header(frames)
            body = frames[1] if len(frames) == 2 else None
            if header.session == 0:
                return self._control(route, decode(body) if body is not None else None, now)
            peer = self.peers.get(header.session)
            if peer is None or route not in (peer.route, peer.joined):
                self.counters.add("session_stale")
                return []
            bodies, out = peer.link.receive(header, body, now)
        except BadMessage:
            self.counters.add("frame_bad")
            return []
        self.out.extend((peer.route, f) for f in out)
        events: list[PeerEvent] = []
        for item in bodies:
            try:
                message = decode(item)
                message.check(peer.geometry)
            except BadMessage as error:
                self.counters.add("message_bad")
                return [*events, *self.close(header.session, f"bad message: {error}")]
            if isinstance(message, Ready):
                peer.geometry = message.geometry
            events.append(PeerMessage(header.session, message))
        return events

    def disconnected(self, route: Route) -> list[PeerEvent]:
        """A route is gone (unroutable, or its connection closed): its session is over."""
        session = self._by_route.get(route)
        return self.close(session, "disconnected") if session is not None else []

    def probe(self, now: float) -> None:
        """Send an acknowledgement on every route of every session."""
        for peer in self.peers.values():
            for route in (peer.route, peer.joined):
                if route is not None:
                    self.out.append((route, peer.link.frame_now(now)))

    def tick(self, now: float) -> list[PeerEvent]:
        """Resend, acknowledge, and judge silence. Call at `next_time()` at the latest."""
        late = max(0.0, now - self._expected)
        events: list[PeerEvent] = []
        awake = False
        for session, peer in list(self.peers.items()):
            if late:
                peer.link.forgive(late, now)
            if now < peer.link.next_time():
                continue
            if reason := peer.link.broken(now):
                events += self.close(session, reason)
                continue
            self.out.extend((peer.route, frames) for frames in peer.link.due(now))
            awake |= self._alone(peer, now)
        if awake:  # one wake-up for the heartbeats of all
            for peer in self.peers.values():
                self._alone(peer, now, self.times.heartbeat / 2)
        self._expected = self.next_time()
        return events

    def next_time(self) -> float:
        """When `tick` must be called next; inf without peers."""
        return min((peer.link.next_time() for peer in self.peers.values()), default=inf)

    def _alone(self, peer: Peer, now: float, early: float = 0.0) -> bool:
        """Send an acknowledgement with nothing to ride on, if it is time."""
        frame = peer.link.idle_frame(now, early)
        if frame is not None:
            # A worker's plan socket may belong to a thread in a long step: its other one listens.
            self.out.append((peer.joined or peer.route, frame))
        return frame is not None

    def _control(self, route: Route, message: Message | None, now: float) -> list[PeerEvent]:
        if message is not None:
            message.check(None)
        match message:
            case Hello(role=role) if role != ROLES[route[0]]:
                self.refuse(Greeted(route, message), f"a {role} on the {ROLES[route[0]]}s' socket")
            case Hello(attempt=attempt):
                session = self._by_route.get(route)
                if session is not None and self.peers[session].hello.attempt == attempt:
                    # The WELCOME was lost or is on its way: the same answer, however often it asks.
                    self.out.append((route, [UNSEQUENCED, encode(self.peers[session].welcome)]))
                    return []
                return [Greeted(route, message)]
            case Join(session=session):
                peer = self.peers.get(session)
                if peer is None or peer.role != "worker" or (peer.joined is not None and peer.joined != route):
                    self.counters.add("session_stale")
                    return []
                if peer.joined is None:
                    peer.joined = route
                    self._by_route[route] = session
                # Heard on this channel, the worker stops repeating JOIN.
                self.out.append((route, peer.link.frame_now(now)))
            case Stale(epoch=epoch):
                return [Outdated(epoch)]
            case _:
                raise BadMessage("body", "does not belong outside a session")
        return []

    def _supersede(self, hello: Hello, now: float) -> list[PeerEvent]:
        for session, peer in list(self.peers.items()):
            if (peer.hello.role, peer.hello.incarnation) == (hello.role, hello.incarnation):
                return self.close(session, "replaced by its own next session")
        return []
