"""Sessions open, fence and end as DESIGN §2 says; both sides are driven by hand, without sockets."""

from __future__ import annotations

import itertools

import pytest

from protocol.codec import encode
from protocol.counters import Counters
from protocol.listener import FRONTENDS, WORKERS, Greeted, Listener, Outdated, PeerClosed, PeerEvent, PeerMessage, Route
from protocol.messages import Done, Hello, Moved, Progress, Resumed, Welcome
from protocol.sessions import Closed, Dialer, Event, Opened, Received, TurnedAway
from protocol.times import Times

TIMES = Times()
KEY = b"k" * 16
EPOCH = 5 << 32


class Pair:
    """A scheduler's listener and one peer's dialer, joined by perfect connections."""

    def __init__(self, role: str = "frontend", epoch: int = EPOCH) -> None:
        self.now = 0.0
        self.socket = FRONTENDS if role == "frontend" else WORKERS
        ids = itertools.count(100)
        self.routes = itertools.count()
        self.listener = Listener(TIMES, Counters(), lambda: next(ids))
        channels = 1 if role == "frontend" else 2
        self.dialer = Dialer(Hello(role, "peer", 77, 0), 1, channels, TIMES, Counters(), 0.0)
        self.route: list[Route] = [self.new_route() for _ in range(channels)]
        self.epoch = epoch
        self.answer = True  # whether HELLOs are welcomed
        self.deaf: set[str] = set()  # sides that hear nothing
        self.peer_events: list[Event] = []
        self.events: list[PeerEvent] = []

    def new_route(self) -> Route:
        return (self.socket, b"r%d" % next(self.routes))

    def run(self, seconds: float = 0.0) -> None:
        until = self.now + seconds
        while True:
            self.peer_events += self.dialer.tick(self.now)
            self.events += self.listener.tick(self.now)
            self.pump()
            if self.now >= until:
                return
            self.now = min(until, self.now + 0.01)

    def pump(self) -> None:
        for _ in range(20):
            for _, channel in sorted(self.dialer.reopen):
                self.route[channel] = self.new_route()
            self.dialer.reopen.clear()
            for channel, queue in enumerate(self.dialer.out):
                while queue:
                    _, frames = queue.popleft()
                    if "listener" not in self.deaf:
                        self.listen(self.route[channel], frames)
            while self.listener.out:
                route, frames = self.listener.out.popleft()
                if route in self.route and "dialer" not in self.deaf:
                    self.peer_events += self.dialer.receive(0, self.route.index(route), frames, self.now)

    def listen(self, route: Route, frames: list[bytes]) -> None:
        for event in self.listener.receive(route, frames, self.now):
            self.events.append(event)
            if isinstance(event, Greeted) and self.answer:
                self.events += self.listener.welcome(event, self.epoch, KEY, 1000, self.now)[1]

    def opened(self) -> list[Welcome]:
        return [event.welcome for event in self.peer_events if isinstance(event, Opened)]

    def closed(self) -> list[str]:
        return [event.reason for event in self.peer_events if isinstance(event, Closed)]


@pytest.mark.parametrize("role", ["frontend", "worker"])
def test_a_hello_is_answered_with_a_session_that_stays_open(role: str) -> None:
    pair = Pair(role)
    pair.run(10.0)
    (welcome,) = pair.opened()
    assert welcome.epoch == EPOCH
    assert pair.dialer.hash_key == KEY
    assert pair.dialer.session == welcome.session
    assert list(pair.listener.peers) == [welcome.session]
    assert pair.closed() == []


@pytest.mark.parametrize("role", ["frontend", "worker"])
def test_messages_pass_both_ways_in_order(role: str) -> None:
    pair = Pair(role)
    pair.run()
    session = pair.dialer.session
    for i in range(50):
        pair.dialer.send(Resumed(i) if role == "frontend" else Progress(1, i), pair.now)
        pair.listener.send(session, Moved(b"%16d" % i), pair.now, weight=2)
    assert pair.listener.unacked(session) == 100
    pair.run(0.5)
    assert [e.message for e in pair.peer_events if isinstance(e, Received)] == [Moved(b"%16d" % i) for i in range(50)]
    got = [e.message for e in pair.events if isinstance(e, PeerMessage)]
    assert got == [Resumed(i) if role == "frontend" else Progress(1, i) for i in range(50)]
    assert pair.listener.unacked(session) == 0


def test_a_hello_waits_until_it_is_answered() -> None:
    pair = Pair()
    pair.answer = False
    pair.run(1.0)
    greetings = [e for e in pair.events if isinstance(e, Greeted)]
    assert len(greetings) >= 4
    assert {g.hello.attempt for g in greetings} == {1}
    pair.answer = True
    pair.run(0.5)
    assert len(pair.opened()) == 1


def test_a_repeated_hello_of_one_attempt_gets_the_same_welcome() -> None:
    pair = Pair()
    pair.deaf = {"dialer"}
    pair.run(0.7)
    pair.deaf = set()
    pair.run(0.5)
    (welcome,) = pair.opened()
    assert list(pair.listener.peers) == [welcome.session]
    assert len([e for e in pair.events if isinstance(e, Greeted)]) == 1


@pytest.mark.parametrize("role", ["frontend", "worker"])
@pytest.mark.parametrize("deaf", ["dialer", "listener"])
def test_silence_ends_the_session_on_both_sides_and_a_new_one_opens(role: str, deaf: str) -> None:
    pair = Pair(role)
    pair.run(0.5)
    first = pair.dialer.session
    pair.deaf = {deaf}
    pair.run(3.0)
    pair.deaf = set()
    pair.run(1.0)
    assert pair.closed()
    assert pair.dialer.session not in (0, first)
    assert list(pair.listener.peers) == [pair.dialer.session]
    assert any(isinstance(e, PeerClosed) and e.session == first for e in pair.events)


@pytest.mark.parametrize("role", ["frontend", "worker"])
def test_on_an_idle_session_one_side_has_the_timer_and_the_other_only_answers(role: str) -> None:
    pair = Pair(role)
    pair.run(1.0)
    frames = {"dialer": 0, "listener": 0}
    timers = []
    for _ in range(40):
        pair.now = min(pair.listener.next_time(), pair.dialer.next_time())
        if pair.now >= pair.dialer.next_time():
            timers.append(pair.now)
        pair.events += pair.listener.tick(pair.now)
        pair.peer_events += pair.dialer.tick(pair.now)
        frames["listener"] += len(pair.listener.out)
        for route, frame in [*pair.listener.out]:
            pair.peer_events += pair.dialer.receive(0, pair.route.index(route), frame, pair.now)
        pair.listener.out.clear()
        frames["dialer"] += sum(len(queue) for queue in pair.dialer.out)
        pair.pump()
        assert not pair.listener.out
    assert timers == []
    assert frames == {"dialer": 40, "listener": 40}
    assert pair.now == pytest.approx(1.0 + 40 * TIMES.heartbeat, abs=TIMES.heartbeat)
    assert pair.closed() == []


def test_a_peer_that_hears_nothing_sends_all_the_same() -> None:
    pair = Pair()
    pair.run(1.0)
    pair.deaf = {"dialer"}
    pair.run(0.6 * TIMES.silence)
    [peer] = pair.listener.peers.values()
    assert pair.now - peer.link.heard <= TIMES.unasked + 0.01


def test_peers_of_one_scheduler_get_their_heartbeats_in_one_wake_up() -> None:
    ids = itertools.count(100)
    listener = Listener(TIMES, Counters(), lambda: next(ids))
    for i in range(3):
        hello = Greeted((FRONTENDS, b"%d" % i), Hello("frontend", "peer", i, 0))
        listener.welcome(hello, EPOCH, KEY, 1000, 0.0)
        listener.tick(0.05 * i)
    listener.out.clear()
    woken = []
    while (now := listener.next_time()) < 0.9 * TIMES.silence:
        listener.tick(now)
        woken.append(len(listener.out))
        listener.out.clear()
    assert woken == [3, 3, 3]


def test_frames_of_an_ended_session_are_dropped_and_counted() -> None:
    pair = Pair()
    pair.run()
    session = pair.dialer.session
    pair.dialer.send(Done(b"x" * 16), pair.now)
    (old,) = pair.dialer.out[0]
    pair.dialer.out[0].clear()
    pair.listener.close(session, "test")
    pair.listen(pair.route[0], old[1])
    assert pair.listener.counters["session_stale"] == 1
    assert not [e for e in pair.events if isinstance(e, PeerMessage)]


def test_a_frame_of_a_live_session_counts_only_on_its_own_route() -> None:
    pair = Pair()
    pair.run()
    pair.dialer.send(Done(b"x" * 16), pair.now)
    (frame,) = pair.dialer.out[0]
    pair.listen((FRONTENDS, b"another"), frame[1])
    assert pair.listener.counters["session_stale"] == 1


def test_a_peer_that_sees_a_lower_epoch_says_so_and_stays_away() -> None:
    pair = Pair(epoch=EPOCH)
    pair.dialer.epoch = EPOCH + 1
    pair.run(0.3)
    assert pair.opened() == []
    assert Outdated(EPOCH + 1) in pair.events


def test_a_peer_moves_to_a_higher_epoch() -> None:
    now, counters = 0.0, Counters()
    dialer = Dialer(Hello("frontend", "f", 1, 0), 2, 1, TIMES, counters, now)
    dialer.tick(now)
    assert [endpoint for endpoint, _ in dialer.out[0]] == [0, 1]
    opened = dialer.receive(0, 0, _control(Welcome(1, 11, EPOCH, KEY)), now)
    assert [type(e) for e in opened] == [Opened]
    events = dialer.receive(1, 0, _control(Welcome(1, 12, EPOCH + 1, KEY)), now)
    assert [type(e) for e in events] == [Closed, Opened]
    assert dialer.session == 12
    assert dialer.reopen == {(0, 0)}
    assert dialer.receive(0, 0, _control(Welcome(1, 13, EPOCH, KEY)), now) == []
    assert counters["welcome_stale"] == 1


def test_a_welcome_of_another_attempt_is_ignored() -> None:
    dialer = Dialer(Hello("frontend", "f", 1, 0), 1, 1, TIMES, Counters(), 0.0)
    assert dialer.receive(0, 0, _control(Welcome(2, 11, EPOCH, KEY)), 0.0) == []
    assert dialer.session == 0


def test_a_role_on_the_wrong_socket_is_refused_with_the_reason() -> None:
    pair = Pair("worker")
    pair.route = [(FRONTENDS, b"a"), (FRONTENDS, b"b")]
    pair.run(0.1)
    refusals = [e for e in pair.peer_events if isinstance(e, TurnedAway)]
    assert refusals
    assert "worker" in refusals[0].reason
    assert pair.listener.counters["session_refused"] == len(refusals)


def test_a_step_that_failed_is_named_until_a_welcome_has_answered() -> None:
    pair = Pair("worker")
    pair.run(0.1)
    first = pair.dialer.session
    pair.peer_events += pair.dialer.fail(9, pair.now, "step 9 raised")
    pair.answer = False
    pair.run(0.5)
    hellos = [e.hello for e in pair.events if isinstance(e, Greeted)]
    assert {(h.failed_session, h.failed_step) for h in hellos[1:]} == {(first, 9)}
    pair.answer = True
    pair.run(0.5)
    pair.dialer.fail(0, pair.now, "leaving")
    pair.run(0.5)
    assert [e.hello for e in pair.events if isinstance(e, Greeted)][-1].failed_step == 0


def test_a_worker_joins_its_results_channel_and_losing_either_ends_the_session() -> None:
    pair = Pair("worker")
    pair.run(0.2)
    session = pair.dialer.session
    peer = pair.listener.peers[session]
    assert peer.joined == pair.route[1]
    pair.events += pair.listener.disconnected(pair.route[1])
    assert any(isinstance(e, PeerClosed) and e.session == session for e in pair.events)
    assert session not in pair.listener.peers


def test_a_message_that_cannot_be_used_ends_the_session_rather_than_vanish() -> None:
    pair = Pair()
    pair.run()
    session = pair.dialer.session
    pair.dialer.send(Done(b"short"), pair.now)
    pair.run()
    assert any(isinstance(e, PeerClosed) and e.session == session and "bad message" in e.reason for e in pair.events)
    assert pair.listener.counters["message_bad"] == 1


@pytest.mark.parametrize("frames", [[], [b""], [b"\xc1", b"x"], [b"\x93\x00\x00\x00"], [b"\x93\x00\x00\x00", b"\x91\xa1x"], [b"x"] * 4])
def test_garbage_on_a_socket_is_counted_and_survived(frames: list[bytes]) -> None:
    pair = Pair()
    pair.run(0.1)
    pair.listen(pair.route[0], frames)
    pair.peer_events += pair.dialer.receive(0, 0, frames, pair.now)
    assert pair.listener.counters["frame_bad"] == 1
    assert pair.dialer._counters["frame_bad"] == 1
    pair.run(2.0)
    assert pair.closed() == []


def _control(message: Welcome) -> list[bytes]:
    return [b"\x93\x00\x00\x00", encode(message)]
