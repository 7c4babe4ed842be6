"""The frontend's sockets under asyncio: one DEALER per scheduler endpoint, read whenever its descriptor says so.

ZeroMQ's descriptor is edge-triggered: it tells once that something changed, and any send or receive may take that
notice. So every socket is read until it is dry, and looked at again after each batch of sends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protocol.counters import Counters
from protocol.keys import ClientKeys
from protocol.sockets import RETRY_REFUSED, Context, Socket, dealer, monitor, news, readable, received, send

log = logging.getLogger("frontend")

BATCH = 64  # messages read before other tasks get their turn


@dataclass
class _Connection:
    dealer: Socket
    monitor: Socket


class Wire:
    """Owns the sockets; hands what arrives to `take(endpoint, frames)`, and says `disconnected(endpoint)` when cut.

    `flush` is called after each batch of either.
    """

    def __init__(
        self,
        context: Context,
        endpoints: Iterable[str],
        take: Callable[[int, list[bytes]], None],
        disconnected: Callable[[int], None],
        flush: Callable[[], None],
        counters: Counters,
        keys: ClientKeys | None = None,
    ) -> None:
        self._context = context
        self._keys = keys
        self._endpoints = list(endpoints)
        self._take = take
        self._disconnected = disconnected
        self._flush = flush
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._told: set[int] = set()  # endpoints whose refusal stands in the log
        self._connections = [self._connect(i) for i in range(len(self._endpoints))]

    def send(self, endpoint: int, frames: list[bytes]) -> None:
        """Hand a message to ZeroMQ. What it cannot take now is dropped: the link sends it again."""
        if not send(self._connections[endpoint].dealer, frames):
            self._counters.add("wire_send_dropped")

    def sent(self, endpoint: int) -> None:
        """Call after a batch of sends: a send may have swallowed the notice that something arrived."""
        connection = self._connections[endpoint]
        if readable(connection.dealer):
            self._loop.call_soon(self._readable, endpoint, connection)

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
        socket = dealer(self._context, self._endpoints[endpoint], self._keys)
        connection = _Connection(socket, monitor(socket))
        for watched, callback in ((connection.dealer, self._readable), (connection.monitor, self._cut)):
            self._loop.add_reader(watched.fileno(), callback, endpoint, connection)
            self._loop.call_soon(callback, endpoint, connection)  # connecting may have swallowed the first notice
        return connection

    def _disconnect(self, connection: _Connection) -> None:
        self._loop.remove_reader(connection.dealer.fileno())
        self._loop.remove_reader(connection.monitor.fileno())
        connection.dealer.disable_monitor()
        connection.monitor.close(0)
        connection.dealer.close(0)

    def _readable(self, endpoint: int, connection: _Connection) -> None:
        if self._drain(endpoint, connection, BATCH) == BATCH:
            self._loop.call_soon(self._readable, endpoint, connection)
        self._flush()

    def _cut(self, endpoint: int, connection: _Connection) -> None:
        if connection.monitor.closed:
            return
        lost, refused = news(connection.monitor)
        if refused:
            self._refused(endpoint, connection, refused)
        if not lost:
            return
        while self._drain(endpoint, connection, BATCH):  # messages may lie unread in front of the end
            pass
        self._disconnected(endpoint)
        self._flush()

    def _refused(self, endpoint: int, connection: _Connection, times: int) -> None:
        """ZeroMQ gives a refused socket up; the key may be let in later, so another one tries, slowly."""
        self._loop.call_later(RETRY_REFUSED, self._retry, endpoint, connection)
        self._counters.add("connection_refused", times)
        if endpoint not in self._told:
            self._told.add(endpoint)
            log.error("the scheduler at %s lets nobody in with this key (--key-file, --server-key)", self._endpoints[endpoint])

    def _retry(self, endpoint: int, connection: _Connection) -> None:
        if self._connections and self._connections[endpoint] is connection:
            self.renew(endpoint)

    def _drain(self, endpoint: int, connection: _Connection, limit: int) -> int:
        """Take up to `limit` messages; returns how many there were."""
        count = 0
        if not connection.dealer.closed:
            for frames in received(connection.dealer, limit):
                self._take(endpoint, frames)
                count += 1
        return count
