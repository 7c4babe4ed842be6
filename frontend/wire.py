"""The frontend's sockets under asyncio: one DEALER per scheduler endpoint, read whenever its descriptor says so.

ZeroMQ's descriptor is edge-triggered: it tells once that something changed, and any send or receive may take that
notice. So every socket is read until it is dry, and looked at again after each batch of sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from protocol.codec import HIGH_WATER, MAX_FRAME
from protocol.counters import Counters

BATCH = 64  # messages read before other tasks get their turn

Socket = zmq.Socket[bytes]


@dataclass
class _Connection:
    dealer: Socket
    monitor: Socket


class Wire:
    """Owns the sockets; hands what arrives to `received(endpoint, frames)`, then `disconnected(endpoint)` when cut."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        endpoints: Iterable[str],
        received: Callable[[int, list[bytes]], None],
        disconnected: Callable[[int], None],
        flush: Callable[[], None],
        counters: Counters,
    ) -> None:
        self._context = context
        self._endpoints = list(endpoints)
        self._received = received
        self._disconnected = disconnected
        self._flush = flush
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._connections = [self._connect(i) for i in range(len(self._endpoints))]

    def send(self, endpoint: int, frames: list[bytes]) -> None:
        """Hand a message to ZeroMQ. What it cannot take now is dropped: the link sends it again."""
        try:
            self._connections[endpoint].dealer.send_multipart(frames, zmq.DONTWAIT, copy=True)
        except zmq.Again:
            self._counters.add("wire_send_dropped")

    def sent(self, endpoint: int) -> None:
        """Call after a batch of sends: a send may have swallowed the notice that something arrived."""
        if _has_input(self._connections[endpoint].dealer):
            self._loop.call_soon(self._readable, endpoint, self._connections[endpoint])

    def renew(self, endpoint: int) -> None:
        """Close an endpoint's socket and connect anew: nothing of the old connection can arrive any more."""
        self._disconnect(self._connections[endpoint])
        self._connections[endpoint] = self._connect(endpoint)

    def close(self) -> None:
        """Close all sockets."""
        for connection in self._connections:
            self._disconnect(connection)
        self._connections = []

    def _connect(self, endpoint: int) -> _Connection:
        dealer: Socket = zmq.Socket(self._context, zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.IMMEDIATE, 1)  # or a HELLO would be kept for each attempt made while nobody listened
        dealer.setsockopt(zmq.SNDHWM, HIGH_WATER)
        dealer.setsockopt(zmq.RCVHWM, HIGH_WATER)
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        dealer.setsockopt(zmq.HEARTBEAT_IVL, 200)
        dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, 600)
        dealer.setsockopt(zmq.HEARTBEAT_TTL, 600)
        monitor: Socket = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        dealer.connect(self._endpoints[endpoint])
        connection = _Connection(dealer, monitor)
        self._loop.add_reader(dealer.fileno(), self._readable, endpoint, connection)
        self._loop.add_reader(monitor.fileno(), self._cut, endpoint, connection)
        return connection

    def _disconnect(self, connection: _Connection) -> None:
        self._loop.remove_reader(connection.dealer.fileno())
        self._loop.remove_reader(connection.monitor.fileno())
        connection.dealer.disable_monitor()
        connection.monitor.close(0)
        connection.dealer.close(0)

    def _readable(self, endpoint: int, connection: _Connection) -> None:
        dealer = connection.dealer
        for _ in range(BATCH):
            if dealer.closed:  # renewed by what was just received
                break
            try:
                frames = dealer.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            self._received(endpoint, frames)
        else:
            self._loop.call_soon(self._readable, endpoint, connection)
        self._flush()

    def _cut(self, endpoint: int, connection: _Connection) -> None:
        cut = False
        while not connection.monitor.closed:
            try:
                if _has_input(connection.monitor):
                    recv_monitor_message(connection.monitor, zmq.DONTWAIT)
                    cut = True
                else:
                    break
            except zmq.Again:
                break
        if cut and not connection.dealer.closed:
            self._drain(endpoint, connection)  # results may lie unread in front of the end
            self._disconnected(endpoint)
            self._flush()

    def _drain(self, endpoint: int, connection: _Connection) -> None:
        while not connection.dealer.closed:
            try:
                frames = connection.dealer.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._received(endpoint, frames)


def _has_input(socket: Socket) -> bool:
    """Whether a message can be read; also takes note of what the descriptor signalled."""
    events = socket.getsockopt(zmq.EVENTS)
    assert isinstance(events, int)
    return bool(events & zmq.POLLIN)
