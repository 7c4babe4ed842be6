"""ZeroMQ sockets as every link uses them: bounded, quick to notice a dead connection, and never waiting at the end."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import zmq

from protocol.chaos import from_environment
from protocol.codec import HIGH_WATER, MAX_FRAME
from protocol.keys import ClientKeys, ServerKeys

HEARTBEAT = 200  # ms; a dead or stopped process and a cut link are seen within a second
HEARTBEAT_TIMEOUT = 600  # ms
RECONNECT = 50  # ms
RETRY_REFUSED = 1.0  # seconds after which a refused peer tries again
REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH

Context = zmq.Context[Any]
Socket = zmq.Socket[bytes]

_INPUT = int(zmq.POLLIN)  # the flag itself makes another flag of every result

_SHIM = from_environment(os.environ)  # of fault tests; None in service


def dealer(context: Context, endpoint: str, keys: ClientKeys | None = None) -> Socket:
    """A peer's socket, connected. Without a connection a send fails at once: links repeat, nothing queues up.

    Keys count for tcp:// alone; an ipc:// socket is guarded by its folder.
    """
    socket = _socket(context, zmq.DEALER)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 4 * RECONNECT)
    if keys is not None and endpoint.startswith("tcp://"):
        keys.apply(socket)
    socket.connect(endpoint)
    return socket


def router(context: Context, endpoint: str, keys: ServerKeys | None = None, role: str = "") -> Socket:
    """A scheduler's socket for peers of one role, bound. A frame for a route that is gone raises EHOSTUNREACH.

    Raises zmq.ZMQError. Keys as with `dealer`.
    """
    socket = _socket(context, zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # One side's pings serve both: a DEALER that hears nothing more gives up when no ping comes either (TTL). While messages
    # flow its TTL does not run; then the link's own silence shows it.
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT)
    if keys is not None and endpoint.startswith("tcp://"):
        keys.apply(socket, role)
    socket.bind(endpoint)
    return socket


class News(NamedTuple):
    """What has become of a socket's connections since the last look."""

    lost: int  # connections that were open and are no more
    refused: int  # attempts that failed: a wrong key, none, or no ZeroMQ at all


def monitor(socket: Socket) -> Socket:
    """A socket that becomes readable when a connection of `socket` is lost or refused; read it with `news`."""
    return socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | REFUSALS)


def news(monitor: Socket) -> News:
    """How many connections have been lost, and how many refused, since the last call."""
    lost = refused = 0
    for event, _ in received(monitor):
        if int.from_bytes(event[:2], sys.byteorder) & REFUSALS:
            refused += 1
        else:
            lost += 1
    return News(lost, refused)


def readable(socket: Socket) -> bool:
    """Whether a message can be read; takes note of what the socket's descriptor tells."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _INPUT)


def received(socket: Socket, limit: int = 1 << 30) -> Iterator[list[bytes]]:
    """The multipart messages that have arrived, at most `limit`, without waiting."""
    with contextlib.suppress(zmq.Again):
        for _ in range(limit):
            yield socket.recv_multipart(zmq.DONTWAIT)
            # Asking costs 7 µs, a receive that finds nothing 14.
            if socket.closed or not readable(socket):
                return


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
    return socket
