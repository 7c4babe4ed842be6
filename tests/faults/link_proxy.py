"""A TCP proxy that knows which link a connection carries, so that a test can cut one of a worker's two alone."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field

from benchmarks.tcp_proxy import Direction, TcpProxy

# The first message on a connection says which link it is (protocol/messages.py): MessagePack of the tag.
TAGS = {b"\xa5hello": "first", b"\xa4join": "results"}
UP, DOWN = "up", "down"  # from the peer to the scheduler, and back


@dataclass(eq=False)
class Connection:
    """One connection through the proxy. `link` is empty until its first message has been seen."""

    peer: socket.socket
    scheduler: socket.socket
    link: str = ""
    ways: dict[str, Direction] = field(default_factory=lambda: {UP: Direction(), DOWN: Direction()})


class LinkProxy(TcpProxy):
    """Holds or closes the connections of a link: "first" (a frontend's, or a worker's plans) or "results".

    A held link stays held for connections that are made meanwhile.
    """

    def __init__(self, port: int) -> None:
        self._all: list[Connection] = []
        self._by_way: dict[Direction, Connection] = {}
        self._held: set[tuple[str, str]] = set()  # (link, way)
        self._links = threading.Lock()
        super().__init__(("127.0.0.1", port))

    def hold(self, link: str, *ways: str) -> None:
        """Hold all bytes of a link, each way that is named; its connections stay open."""
        with self._links:
            self._held |= {(link, way) for way in ways}
            self._apply()

    def release(self) -> None:
        """Let everything flow that is held."""
        with self._links:
            self._held.clear()
            self._apply()

    def held_bytes(self) -> int:
        """Bytes that have arrived while their way was held."""
        return sum(way.held for connection in self._all for way in connection.ways.values())

    def close_link(self, link: str, *halves: str) -> int:
        """Close the peer's ("up") or the scheduler's ("down") half of a link's connections, or both; returns how many."""
        with self._links:
            found = [connection for connection in self._all if connection.link == link]
            self._all = [connection for connection in self._all if connection.link != link]
        for connection in found:
            for half, sock in ((UP, connection.peer), (DOWN, connection.scheduler)):
                if half in halves:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                else:  # this half must not hear that the other one is closed
                    connection.ways[DOWN if half == UP else UP].flowing.clear()
        return len(found)

    def close(self) -> None:
        with self._links:
            self._held.clear()
            for connection in self._by_way.values():
                for way in connection.ways.values():
                    way.flowing.set()
        super().close()

    # ------------------------------------------------------------ inside

    def _apply(self) -> None:
        for connection in self._all:
            for name, way in connection.ways.items():
                if connection.link and (connection.link, name) in self._held:
                    way.flowing.clear()
                else:
                    way.flowing.set()

    def _pump(self, source: socket.socket, sink: socket.socket, way: Direction) -> None:
        # Called twice for a connection, upwards first.
        with self._links:
            if way is self.up:
                connection = Connection(source, sink)
                self._all.append(connection)
            else:  # which may have been closed by name meanwhile
                connection = next(c for c in self._by_way.values() if c.peer is sink)
            own = connection.ways[UP if way is self.up else DOWN]
            self._by_way[own] = connection
        super()._pump(source, sink, own)

    def _arrived(self, way: Direction, data: bytes) -> None:
        connection = self._by_way[way]
        if connection.link or way is not connection.ways[UP]:
            return
        for tag, link in TAGS.items():
            if tag in data:
                with self._links:
                    connection.link = link
                    self._apply()
