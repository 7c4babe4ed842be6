"""The poller finds every message, however its notice was lost, and asks no socket without a reason."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import zmq

from protocol import poller as module
from protocol.poller import Poller
from protocol.sockets import Context, Socket, readable, received, send


@pytest.fixture
def pair() -> Iterator[tuple[Socket, Socket]]:
    """Two sockets of one context, connected."""
    context: Context = zmq.Context()
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    left.bind("inproc://poller")
    right.connect("inproc://poller")
    yield left, right
    for socket in (left, right):
        socket.close(0)
    context.term()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Socket]:
    """The sockets that were asked for their events."""
    sockets: list[Socket] = []

    def asks(socket: Socket) -> bool:
        sockets.append(socket)
        return readable(socket)

    monkeypatch.setattr(module, "readable", asks)
    return sockets


def test_a_message_is_found_and_read_once(pair: tuple[Socket, Socket]) -> None:
    left, right = pair
    poller = Poller()
    poller.register(left)
    assert poller.wait(0) == set()
    send(right, [b"a"])
    assert poller.wait(5) == {left}
    assert list(received(left)) == [[b"a"]]
    assert poller.wait(0) == set()


def test_what_is_left_unread_is_found_again(pair: tuple[Socket, Socket]) -> None:
    left, right = pair
    poller = Poller()
    poller.register(left)
    send(right, [b"a"])
    send(right, [b"b"])
    assert poller.wait(5) == {left}
    assert poller.wait(5) == {left}
    assert list(received(left, 1)) == [[b"a"]]
    assert poller.wait(5) == {left}
    assert list(received(left)) == [[b"b"]]


def test_a_notice_that_a_call_has_swallowed_is_not_lost(pair: tuple[Socket, Socket]) -> None:
    left, right = pair
    poller = Poller()
    poller.register(left)
    assert poller.wait(0) == set()
    send(right, [b"a"])
    left.getsockopt(zmq.EVENTS)  # what a send does at times: the descriptor tells nothing any more
    assert poller.wait(0) == set()
    poller.used(left)
    assert poller.wait(5) == {left}


def test_an_idle_socket_is_not_asked(pair: tuple[Socket, Socket], asked: list[Socket]) -> None:
    left, right = pair
    event = os.eventfd(0, os.EFD_NONBLOCK)
    poller = Poller()
    poller.register(left, right, event)
    poller.wait(0)
    asked.clear()
    os.eventfd_write(event, 1)
    assert poller.wait(5) == {event}
    assert asked == []
    os.eventfd_read(event)
    os.close(event)


def test_an_unregistered_socket_is_forgotten(pair: tuple[Socket, Socket]) -> None:
    left, right = pair
    poller = Poller()
    poller.register(left)
    send(right, [b"a"])
    assert poller.wait(5) == {left}
    poller.unregister(left)
    assert poller.wait(0) == set()
    poller.close()
