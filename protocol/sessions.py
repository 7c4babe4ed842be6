"""Sessions, the side that connects: a frontend or a worker, and every scheduler it knows. No I/O, no clock.

A `Dialer` says HELLO on each endpoint until a scheduler answers WELCOME; from then on one link runs over that
endpoint until it breaks. It obeys the highest epoch it has seen, tells a lower one so, and never goes on with a
connection whose session has ended: the owner closes that socket and opens a new one (`reopen`). A frontend uses one
channel (socket) per endpoint; a worker two, because two threads use them: plans arrive on channel 0, results leave on
channel 1, which joins the session by its id.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf

import msgspec

from protocol.codec import Header, decode, decode_header, encode
from protocol.columns import BadMessage
from protocol.counters import Counters
from protocol.links import Link
from protocol.messages import Geometry, Hello, Join, Message, Refused, Stale, Welcome
from protocol.times import Times

UNSEQUENCED = encode(Header())


@dataclass(frozen=True, slots=True)
class Opened:
    """A session is open; what lives must be named again."""

    welcome: Welcome
    endpoint: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The session is over; nothing of it will arrive or be delivered any more."""

    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class Received:
    """A message of the open session, checked."""

    message: Message


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """A scheduler refuses this peer, and says why."""

    reason: str
    endpoint: int


Event = Opened | Closed | Received | TurnedAway


@dataclass(slots=True)
class _Line:
    """One endpoint: which attempt its connection is, and when to say HELLO again."""

    attempt: int = 1
    hello_at: float = -inf
    join_at: float = inf


class Dialer:
    """The peer's side of its session. Feed it frames and the time; transmit `out`, renew the sockets in `reopen`."""

    def __init__(self, hello: Hello, endpoints: int, channels: int, times: Times, counters: Counters, now: float) -> None:
        self._hello = hello
        self._channels = channels
        self._times = times
        self._counters = counters
        self._lines = [_Line() for _ in range(endpoints)]
        self._link: Link | None = None
        self._endpoint = -1
        self._woke = now
        self._expected = inf
        self.epoch = hello.epoch
        self.hash_key = hello.hash_key
        self.geometry: Geometry | None = None  # set by a worker: plans are checked against it
        self.out: list[deque[tuple[int, list[bytes]]]] = [deque() for _ in range(channels)]  # per channel: (endpoint, frames)
        self.reopen: set[tuple[int, int]] = set()  # (endpoint, channel) whose socket must be closed and made anew
        self._failed = (0, 0)

    @property
    def session(self) -> int:
        """Id of the open session; 0 if there is none."""
        return self._link.session if self._link else 0

    @property
    def round_trip(self) -> float:
        """Smoothed round trip of the open session in seconds; 0 if unknown."""
        return self._link.sender.round_trip if self._link else 0.0

    def send(self, message: Message, now: float) -> None:
        """Send on the open session. Without one the message is dropped, counted: its owner names it again later."""
        if self._link is None:
            self._counters.add("session_none_dropped")
            return
        self._transmit(self._link.send(encode(message), 0, now))

    def fail(self, step: int, now: float, reason: str) -> list[Event]:
        """End the session, because `step` raised (0: for another reason of our own); the next HELLO names it."""
        if self._link and step:
            self._failed = (self._link.session, step)
        return self._close(reason, now)

    def receive(self, endpoint: int, channel: int, frames: list[bytes], now: float) -> list[Event]:
        """Take what arrived on a channel of an endpoint. Bad frames are counted and dropped."""
        try:
            header = decode_header(frames)
            if header.session == 0:
                return self._control(endpoint, decode(frames[1]) if len(frames) == 2 else None, now)
            if self._link is None or header.session != self._link.session or endpoint != self._endpoint:
                self._counters.add("session_stale")
                return []
            if channel == 1:
                self._lines[endpoint].join_at = inf
            bodies, frames_out = self._link.receive(header, frames[1] if len(frames) == 2 else None, now)
        except BadMessage:
            self._counters.add("frame_bad")
            return []
        self._transmit(frames_out)
        events: list[Event] = []
        for body in bodies:
            try:
                message = decode(body)
                message.check(self.geometry)
            except BadMessage as error:
                # A body that came in order and cannot be used is the peer's defect: going on would lose it in silence.
                self._counters.add("message_bad")
                return [*events, *self._close(f"bad message: {error}", now)]
            events.append(Received(message))
        return events

    def disconnected(self, endpoint: int, now: float) -> list[Event]:
        """A socket of this endpoint lost its connection (read it dry first): its session is over."""
        if self._link is not None and endpoint == self._endpoint:
            return self._close("disconnected", now)
        return []

    def tick(self, now: float) -> list[Event]:
        """Say HELLO where it is time, resend, acknowledge, and judge silence. Call at `next_time()` at the latest."""
        if self._link is not None and now > self._expected:
            self._link.forgive(now - self._expected, now)
        events: list[Event] = []
        if self._link is not None and now >= self._link.next_time():
            if reason := self._link.broken(now):
                events = self._close(reason, now)
            else:
                self._transmit(self._link.due(now))
                if frame := self._link.idle_frame(now):
                    self._transmit([frame])
        if self._link is not None and now >= (line := self._lines[self._endpoint]).join_at:
            line.join_at = now + self._times.reconnect
            self._emit(self._endpoint, 1, Join(self._link.session))
        for endpoint, line in enumerate(self._lines):
            if now >= line.hello_at and not (self._link and endpoint == self._endpoint):
                line.hello_at = now + (self._times.silence if self._link else self._times.reconnect)
                self._emit(endpoint, 0, self._greeting(line))
        self._expected = self.next_time()
        return events

    def next_time(self) -> float:
        """When `tick` must be called next."""
        earliest = self._link.next_time() if self._link else inf
        for endpoint, line in enumerate(self._lines):
            if self._link and endpoint == self._endpoint:
                earliest = min(earliest, line.join_at)
            else:
                earliest = min(earliest, line.hello_at)
        return earliest

    def _greeting(self, line: _Line) -> Hello:
        session, step = self._failed
        return msgspec.structs.replace(
            self._hello,
            attempt=line.attempt,
            epoch=self.epoch,
            live=self._link is not None,
            hash_key=self.hash_key,
            failed_session=session,
            failed_step=step,
        )

    def _control(self, endpoint: int, message: Message | None, now: float) -> list[Event]:
        line = self._lines[endpoint]
        if message is not None:
            message.check(None)
        match message:
            case Welcome(attempt=attempt) if attempt != line.attempt:
                self._counters.add("welcome_stale")
            case Welcome(epoch=epoch) if epoch < self.epoch:
                self._counters.add("welcome_lower_epoch")
                self._emit(endpoint, 0, Stale(self.epoch))
            case Welcome(attempt=attempt, session=session) if session != self.session:
                events = self._close("a higher epoch", now) if self._link else []
                if attempt == line.attempt:  # else it came over the connection that has just been given up
                    self._open(endpoint, message, now)
                    events.append(Opened(message, endpoint))
                return events
            case Refused(attempt=attempt, reason=reason) if attempt == line.attempt:
                line.hello_at = now + 10 * self._times.reconnect
                return [TurnedAway(reason, endpoint)]
            case Welcome() | Refused():
                pass
            case _:
                raise BadMessage("body", "does not belong outside a session")
        return []

    def _open(self, endpoint: int, welcome: Welcome, now: float) -> None:
        self._link = Link(welcome.session, self._times, self._counters, now)
        self._endpoint = endpoint
        self.epoch = welcome.epoch
        self.hash_key = welcome.hash_key
        self._failed = (0, 0)
        if self._channels == 2:
            self._lines[endpoint].join_at = now + self._times.reconnect
            self._emit(endpoint, 1, Join(welcome.session))

    def _close(self, reason: str, now: float) -> list[Event]:
        if self._link is None:
            return []
        session, endpoint = self._link.session, self._endpoint
        self._link, self._endpoint = None, -1
        for queue in self.out:
            kept = [item for item in queue if item[0] != endpoint]
            queue.clear()
            queue.extend(kept)
        self.reopen |= {(endpoint, channel) for channel in range(self._channels)}
        line = self._lines[endpoint]
        line.attempt += 1
        line.hello_at, line.join_at = now, inf
        self._counters.add("session_closed")
        return [Closed(session, reason)]

    def _transmit(self, frames: list[list[bytes]]) -> None:
        channel = self._channels - 1
        self.out[channel].extend((self._endpoint, f) for f in frames)

    def _emit(self, endpoint: int, channel: int, message: Message) -> None:
        self.out[channel].append((endpoint, [UNSEQUENCED, encode(message)]))
