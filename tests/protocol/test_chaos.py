"""The transport shim of fault tests: what it does to messages, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from protocol.chaos import Chaos, from_environment
from protocol.service import CannotRun


@pytest.fixture
def socket() -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as made:
        yield made


def sent(chaos: Chaos, socket: zmq.Socket[bytes], count: int, route: bytes = b"route") -> list[int]:
    """The numbers of the messages that pass, in the order in which they do."""
    return [int(passed[1]) for i in range(count) for passed in chaos.passes(socket, [route, b"%d" % i])]


def test_without_the_variable_there_is_no_shim():
    assert from_environment({}) is None


def test_messages_are_dropped_and_repeated_by_their_shares(socket):
    assert sent(Chaos("drop=1"), socket, 10) == []
    assert sent(Chaos("dup=1"), socket, 3) == [0, 0, 1, 1, 2, 2]
    assert 50 < 1000 - len(sent(Chaos("drop=0.1,seed=1"), socket, 1000)) < 200


def test_a_late_message_is_overtaken_by_a_window_at_most(socket):
    order = sent(Chaos("reorder=8,seed=2"), socket, 1000)
    late = [sum(later > number for later in order[:at]) for at, number in enumerate(order)]
    assert 0 < max(late) <= 8
    assert len(order) == len(set(order)) > 990


def test_a_late_message_of_one_route_never_goes_out_with_another(socket):
    chaos = Chaos("reorder=8,seed=3")
    for i in range(200):
        route = b"ab"[i % 2 : i % 2 + 1]
        assert all(passed[0] == route for passed in chaos.passes(socket, [route, b"x"]))


@pytest.mark.parametrize("text", ["drop", "drop=x", "loss=1", "drop=2", "dup=nan", "reorder=-1", "reorder=inf"])
def test_a_text_that_means_nothing_is_refused(text):
    with pytest.raises(ValueError, match="PAGEWIRE_CHAOS"):
        Chaos(text)
    with pytest.raises(CannotRun, match="PAGEWIRE_CHAOS"):
        from_environment({"PAGEWIRE_CHAOS": text})
