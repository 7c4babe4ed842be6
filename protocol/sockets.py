"""ZeroMQ sockets as every link uses them: bounded, quick to notice a dead connection, and never waiting at the end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import zmq

from protocol.chaos import from_environment
from protocol.codec import HIGH_WATER, MAX_FRAME

HEARTBEAT = 200  # ms; a dead or stopped process and a cut link are seen within a second
HEARTBEAT_TIMEOUT = 600  # ms
RECONNECT = 50  # ms

Context = zmq.Context[Any]
Socket = zmq.Socket[bytes]

_SHIM = from_environment(os.environ)  # of fault tests; None in service


def dealer(context: Context, endpoint: str) -> Socket:
    """A peer's socket, connected. Without a connection a send fails at once: links repeat, nothing queues up."""
    socket = _socket(context, zmq.DEALER)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 4 * RECONNECT)
    socket.connect(endpoint)
    return socket


def router(context: Context, endpoint: str) -> Socket:
    """A scheduler's socket, bound. A frame for a route that is gone raises EHOSTUNREACH. Raises zmq.ZMQError."""
    socket = _socket(context, zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.bind(endpoint)
    return socket


def monitor(socket: Socket) -> Socket:
    """A socket that becomes readable when a connection of `socket` is lost; read it with `lost`."""
    return socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)


def lost(monitor: Socket) -> int:
    """How many connections have been lost since the last call."""
    count = 0
    for _ in received(monitor):
        count += 1
    return count


def received(socket: Socket, limit: int = 1 << 30) -> Iterator[list[bytes]]:
    """The multipart messages that have arrived, at most `limit`, without waiting."""
    with contextlib.suppress(zmq.Again):
        for _ in range(limit):
            yield socket.recv_multipart(zmq.DONTWAIT)


def send(socket: Socket, frames: list[bytes]) -> bool:
    """Send without waiting. False if it cannot go out now: the link sends it again. Raises zmq.ZMQError (EHOSTUNREACH)."""
    try:
        if _SHIM is None:
            socket.send_multipart(frames, zmq.DONTWAIT, copy=True)
        else:
            for passed in _SHIM.passes(socket, frames):
                socket.send_multipart(passed, zmq.DONTWAIT, copy=True)
    except zmq.Again:
        return False
    return True


def _socket(context: Context, kind: int) -> Socket:
    socket: Socket = zmq.Socket(context, kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT)
    return socket
