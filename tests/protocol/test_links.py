"""A link delivers in order and once, whatever the connection does to its frames."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import Header, decode_header, encode
from protocol.columns import BadMessage
from protocol.counters import Counters
from protocol.links import MAX_BACKOFF, WINDOW, Link, Receiver, Sender
from protocol.times import Times

TIMES = Times()


def exchange(seed: int, messages: int, loss: float, duplication: float, spread: float) -> tuple[list[bytes], list[bytes], Counters]:
    """Send numbered bodies both ways over a network that loses, repeats and delays; returns what each side received."""
    rng = random.Random(seed)
    counters = Counters()
    ends = [Link(7, TIMES, counters, 0.0), Link(7, TIMES, counters, 0.0)]
    wire: list[tuple[float, int, int, list[bytes]]] = []
    received: list[list[bytes]] = [[], []]
    sent = [0, 0]
    now, order = 0.0, 0

    def transmit(source: int, frames: list[list[bytes]]) -> None:
        nonlocal order
        for frame in frames:
            for _ in range(1 + (rng.random() < duplication)):
                if rng.random() >= loss:
                    order += 1
                    wire.append((now + rng.random() * spread, order, 1 - source, frame))

    while now < 60 and (any(len(r) < messages for r in received) or not all(e.sender.idle for e in ends)):
        now += 0.003
        for side, end in enumerate(ends):
            if sent[side] < messages:
                transmit(side, end.send(b"%d" % sent[side], 1, now))
                sent[side] += 1
            assert end.broken(now) is None
            transmit(side, end.due(now))
            if frame := end.idle_frame(now):
                transmit(side, [frame])
        wire.sort()
        while wire and wire[0][0] <= now:
            _, _, to, frame = wire.pop(0)
            bodies, out = ends[to].receive(decode_header(frame), frame[1] if len(frame) == 2 else None, now)
            received[to] += bodies
            transmit(to, out)
    assert all(end.sender.weight == 0 for end in ends)
    return received[0], received[1], counters


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.01, 0.1]), st.sampled_from([0.0, 0.1]), st.sampled_from([0.001, 0.04]))
def test_bodies_arrive_in_order_and_once(seed: int, loss: float, duplication: float, spread: float) -> None:
    left, right, _ = exchange(seed, 120, loss, duplication, spread)
    expected = [b"%d" % i for i in range(120)]
    assert left == expected
    assert right == expected


def test_a_lossless_link_resends_nothing() -> None:
    _, _, counters = exchange(1, 200, 0.0, 0.0, 0.001)
    assert counters.get("link_resent", 0) == 0
    assert counters.get("link_duplicate", 0) == 0


def test_losses_and_duplicates_are_counted() -> None:
    _, _, counters = exchange(2, 200, 0.2, 0.2, 0.02)
    assert counters["link_resent"] > 0
    assert counters["link_duplicate"] > 0
    assert counters["link_reordered"] > 0


def test_a_full_window_keeps_messages_back_until_it_moves() -> None:
    sender = Sender(TIMES, Counters(), 0.0)
    sent = [item for i in range(WINDOW + 5) for item in sender.push(b"x", 1, 0.0)]
    assert len(sent) == WINDOW
    assert sender.weight == WINDOW + 5
    assert [sequence for sequence, _ in sender.acknowledged(3, 0.1)] == [WINDOW + 1, WINDOW + 2, WINDOW + 3]
    assert sender.weight == WINDOW + 2


def test_a_window_that_does_not_move_breaks_the_session() -> None:
    link = Link(1, TIMES, Counters(), 0.0)
    link.send(b"x", 0, 0.0)
    for tick in range(int(TIMES.window * 4)):
        link.receive(Header(1, 0, 0), None, tick / 4)  # it is heard, but acknowledges nothing
    assert link.broken(TIMES.window - 0.01) is None
    assert link.broken(TIMES.window) == "window stuck"


def test_silence_breaks_the_session_unless_the_judge_was_late() -> None:
    link = Link(1, TIMES, Counters(), 0.0)
    assert link.broken(TIMES.silence - 0.01) is None
    assert link.broken(TIMES.silence) == "silent"
    link.forgive(5.0, TIMES.silence)
    assert link.broken(TIMES.silence) is None
    assert link.broken(2 * TIMES.silence) == "silent"


def test_a_loop_that_is_late_at_every_turn_ends_a_silence_all_the_same() -> None:
    for late in (0.0001, 0.05):
        link, now = Link(1, TIMES, Counters(), 0.0), 0.0
        while link.broken(now) is None:
            link.due(now)
            link.idle_frame(now)
            now = link.next_time() + late
            link.forgive(late, now)
            assert now < 2.5 * TIMES.silence, "it is never judged"
        assert now >= TIMES.silence


def test_an_acknowledgement_of_its_own_goes_out_after_the_ack_time() -> None:
    link = Link(1, TIMES, Counters(), 0.0)
    link.idle_frame(0.0)
    link.receive(Header(1, 1, 0), b"x", 0.1)
    assert link.idle_frame(0.1 + TIMES.ack / 2) is None
    frame = link.idle_frame(0.1 + TIMES.ack)
    assert frame is not None
    assert decode_header(frame).acknowledged == 1
    assert link.idle_frame(0.1 + TIMES.ack) is None


def test_a_heartbeat_is_answered_at_once_and_an_answer_is_not() -> None:
    leader, peer = Link(1, TIMES, Counters(), 0.0, leads=True), Link(1, TIMES, Counters(), 0.0)
    for link in (leader, peer):
        link.frame_now(0.0)
    now = leader.next_time()
    assert now == TIMES.heartbeat
    beat = leader.idle_frame(now)
    assert beat is not None
    _, [answer] = peer.receive(decode_header(beat), None, now)
    assert leader.receive(decode_header(answer), None, now) == ([], [])
    assert peer.next_time() > leader.next_time() > now


def test_a_repeated_message_is_acknowledged_at_once_and_given_once() -> None:
    receiver = Receiver(TIMES, Counters())
    assert receiver.take(1, b"x", 0.0) == [b"x"]
    receiver.acked()
    assert receiver.take(1, b"x", 0.5) == []
    assert receiver.ack_at == 0.5


def test_resends_wait_longer_each_time_up_to_a_bound() -> None:
    sender = Sender(TIMES, Counters(), 0.0)
    sender.push(b"x", 0, 0.0)
    resent = []
    for step in range(1000):
        now = step * 0.001
        resent += [now for _ in sender.due(now)]
    gaps = [b - a for a, b in itertools.pairwise([0.0, *resent])]
    assert gaps == pytest.approx([min(TIMES.resend * 2**i, TIMES.resend * MAX_BACKOFF) for i in range(len(gaps))], abs=0.002)


@pytest.mark.parametrize("header", [Header(1, 0, 5), Header(1, WINDOW + 1, 0), Header(1, 0, 0)])
def test_a_header_that_cannot_be_is_refused(header: Header) -> None:
    link = Link(1, TIMES, Counters(), 0.0)
    with pytest.raises(BadMessage):
        link.receive(header, b"x", 0.0)


@pytest.mark.parametrize(
    "frames",
    [[], [b"", b"", b""], [b"x" * 65], [b"\xc1"], [b"\x93\x01\x02"], [encode(Header())[:-1]], [b"\x91" * 60], [b"\x93\xff\x00\x00"]],
)
def test_frames_that_are_no_header_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(BadMessage):
        decode_header(frames)
