"""A link delivers in order and once, over connections that may lose, repeat and reorder. No I/O, no clock.

One link belongs to one session. Its two directions are independent: `Sender` numbers messages from 1, keeps them until
acknowledged and sends them again; `Receiver` restores the order. Acknowledgements are cumulative and ride on whatever
goes the other way. The scheme is TCP's, without its congestion control: the window and the credit above it bound what
is in flight.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf

from protocol.codec import Header, encode
from protocol.columns import BadMessage
from protocol.counters import Counters
from protocol.times import Times

WINDOW = 1024  # messages sent and not yet acknowledged
MAX_BACKOFF = 4  # times the first timeout; more would leave a lossy link too few tries within the window time


@dataclass(slots=True)
class _Sent:
    sequence: int
    body: bytes
    weight: int
    at: float
    resent: bool = False


class Sender:
    """The sending half: `push` a body, hand `acknowledged` every ack, and transmit what `due` returns."""

    def __init__(self, times: Times, counters: Counters, now: float) -> None:
        self._times = times
        self._counters = counters
        self._next = 1
        self._backoff = 1
        self._unacked: deque[_Sent] = deque()
        self._waiting: deque[tuple[bytes, int]] = deque()
        self.weight = 0  # of all messages pushed and not acknowledged
        self.round_trip = 0.0  # smoothed, seconds; 0 until measured
        self.moved = now  # when the window last moved, or last became non-empty

    def push(self, body: bytes, weight: int, now: float) -> list[tuple[int, bytes]]:
        """Take a message; returns what to transmit now: (sequence, body), or nothing while the window is full."""
        self.weight += weight
        self._waiting.append((body, weight))
        return self._fill(now)

    def acknowledged(self, upto: int, now: float) -> list[tuple[int, bytes]]:
        """Take a cumulative ack; returns waiting messages that fit the window now. Raises BadMessage if never sent."""
        if upto >= self._next:
            raise BadMessage("acknowledged", f"{upto} was never sent")
        while self._unacked and self._unacked[0].sequence <= upto:
            sent = self._unacked.popleft()
            self.weight -= sent.weight
            self.moved = now
            self._backoff = 1
            if not sent.resent:
                sample = now - sent.at
                self.round_trip = sample if self.round_trip == 0.0 else 0.875 * self.round_trip + 0.125 * sample
        return self._fill(now) if self._waiting else []

    def due(self, now: float) -> list[tuple[int, bytes]]:
        """The messages to send again now, oldest first. The oldest decides when; each round doubles the wait."""
        if not self._unacked or now < self._unacked[0].at + self._timeout():
            return []
        timeout = self._timeout()
        again = []
        for sent in self._unacked:
            if now >= sent.at + timeout:
                sent.at, sent.resent = now, True
                again.append((sent.sequence, sent.body))
        self._backoff = min(2 * self._backoff, MAX_BACKOFF)
        self._counters.add("link_resent", len(again))
        return again

    @property
    def idle(self) -> bool:
        """Whether everything pushed has been acknowledged."""
        return not self._unacked and not self._waiting

    def stuck(self, now: float) -> bool:
        """Whether the window has not moved for the window time."""
        return bool(self._unacked) and now >= self.moved + self._times.window

    def next_time(self) -> float:
        """When `due` or `stuck` has something to say."""
        if not self._unacked:
            return inf
        return min(self._unacked[0].at + self._timeout(), self.moved + self._times.window)

    def _timeout(self) -> float:
        return min(max(self._times.resend, 4 * self.round_trip) * self._backoff, self._times.window / 4)

    def _fill(self, now: float) -> list[tuple[int, bytes]]:
        out = []
        while self._waiting and len(self._unacked) < WINDOW:
            body, weight = self._waiting.popleft()
            if not self._unacked:
                self.moved = now
            self._unacked.append(_Sent(self._next, body, weight, now))
            out.append((self._next, body))
            self._next += 1
        return out


class Receiver:
    """The receiving half: gives bodies in order, each once, and says when an acknowledgement is due."""

    def __init__(self, times: Times, counters: Counters) -> None:
        self._times = times
        self._counters = counters
        self._early: dict[int, bytes] = {}
        self.last = 0  # every sequence up to this one has been given on
        self.ack_at = inf  # when an ack must have gone out

    def take(self, sequence: int, body: bytes, now: float) -> list[bytes]:
        """Take a numbered body; returns those whose turn has come. Raises BadMessage beyond the window."""
        if sequence <= self.last or sequence in self._early:
            self._counters.add("link_duplicate")
            self.ack_at = now  # its sender has missed an ack
            return []
        if sequence > self.last + WINDOW:
            raise BadMessage("sequence", f"{sequence} lies beyond the window")
        self._early[sequence] = body
        ready = []
        while (following := self._early.pop(self.last + 1, None)) is not None:
            self.last += 1
            ready.append(following)
        if self._early and not ready:
            self._counters.add("link_reordered")
        self.ack_at = min(self.ack_at, now + self._times.ack)
        return ready

    def acked(self) -> None:
        """An acknowledgement of `last` goes out now."""
        self.ack_at = inf


class Link:
    """Both halves of one session, and its silence. Frames to transmit are returned; the owner knows the socket.

    Both sides of an idle link must be heard, but one timer is enough: the side that `leads` sends a heartbeat, which
    the other answers in the wake-up that it brings. The other's own timer runs out only when nothing comes.
    """

    def __init__(self, session: int, times: Times, counters: Counters, now: float, *, leads: bool = False) -> None:
        self.session = session
        self._quiet = times.heartbeat if leads else times.unasked  # seconds that it may send nothing
        self.sender = Sender(times, counters, now)
        self.receiver = Receiver(times, counters)
        self._times = times
        self.heard = now
        self.sent = -inf
        self._forgiven = 0.0  # seconds, since it was heard
        self._next: float | None = None  # what `next_time` has found, until something changes

    def send(self, body: bytes, weight: int, now: float) -> list[list[bytes]]:
        """Send a message; `weight` is what it counts in `sender.weight` until acknowledged."""
        return self._frames(self.sender.push(body, weight, now), now)

    def receive(self, header: Header, body: bytes | None, now: float) -> tuple[list[bytes], list[list[bytes]]]:
        """Take a frame of this session; returns (bodies in order, frames to transmit). Raises BadMessage."""
        self._next = None
        freed = self.sender.acknowledged(header.acknowledged, now)
        bodies = []
        if body is not None:
            if header.sequence == 0:
                raise BadMessage("sequence", "a body without a number in a session")
            bodies = self.receiver.take(header.sequence, body, now)
        self.heard, self._forgiven = now, 0.0
        frames = self._frames(freed, now)
        if body is None and now >= self.sent + self._quiet / 2:  # a heartbeat; one that answers ours needs no answer
            frames.append(self.frame_now(now))
        return bodies, frames

    def due(self, now: float) -> list[list[bytes]]:
        """Frames to send again."""
        self._next = None
        return self._frames(self.sender.due(now), now)

    def idle_frame(self, now: float, early: float = 0.0) -> list[bytes] | None:
        """A frame of acknowledgement alone, if one is due or the heartbeat will be within `early` seconds."""
        if now < self.receiver.ack_at and now < self.sent + self._quiet - early:
            return None
        return self.frame_now(now)

    def frame_now(self, now: float) -> list[bytes]:
        """A frame of acknowledgement alone, whether or not one is due."""
        return self._frame(0, None, now)

    def broken(self, now: float) -> str | None:
        """Why the session is over, if it is."""
        if now >= self.heard + self._times.silence:
            return "silent"
        if self.sender.stuck(now):
            return "window stuck"
        return None

    def forgive(self, late: float, now: float) -> None:
        """This side's loop ran late by `late` seconds: what it could not hear meanwhile does not count.

        Delays that every loop has do not matter, and one silence is forgiven one silence time in all: else a loop that
        is late at each of its turns would find each of them too early to judge, and never end anything.
        """
        late = min(late, self._times.silence - self._forgiven)
        if late > self._times.ack:
            self._next = None
            self._forgiven += late
            self.heard = min(self.heard + late, now)
            self.sender.moved = min(self.sender.moved + late, now)

    def next_time(self) -> float:
        """When this link next needs attention."""
        if self._next is None:
            self._next = min(self.receiver.ack_at, self.sent + self._quiet, self.heard + self._times.silence, self.sender.next_time())
        return self._next

    def _frames(self, messages: list[tuple[int, bytes]], now: float) -> list[list[bytes]]:
        return [self._frame(sequence, body, now) for sequence, body in messages]

    def _frame(self, sequence: int, body: bytes | None, now: float) -> list[bytes]:
        self._next = None
        self.sent = now
        self.receiver.acked()
        header = encode(Header(self.session, sequence, self.receiver.last))
        return [header] if body is None else [header, body]
