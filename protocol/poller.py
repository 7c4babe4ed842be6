"""Waits for ZeroMQ sockets and plain descriptors in one `epoll`.

ZeroMQ's own poller asks every socket before and after each wait, two system calls each time: 45 in a worker's step. A
socket's descriptor tells as much. It is readable while its socket has not taken note of a change; any call on the socket
may take that note, so one that was used is asked once more before the next wait.
"""

from __future__ import annotations

import select

from protocol.sockets import Socket, readable

Source = Socket | int


class Poller:
    """What is readable, of the sources that were registered."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sources: dict[int, Source] = {}  # by descriptor
        self._used: set[Socket] = set()

    def register(self, *sources: Source) -> None:
        """Watch sockets and descriptors."""
        for source in sources:
            descriptor = _descriptor(source)
            self._sources[descriptor] = source
            self._epoll.register(descriptor, select.EPOLLIN)
            if not isinstance(source, int):
                self._used.add(source)  # connecting may have swallowed the first notice

    def unregister(self, source: Source) -> None:
        """Watch it no more; to be called before it is closed."""
        descriptor = _descriptor(source)
        del self._sources[descriptor]
        self._epoll.unregister(descriptor)
        if not isinstance(source, int):
            self._used.discard(source)

    def used(self, socket: Socket) -> None:
        """To be called behind a send. What `wait` has returned counts as used, whether or not it is read."""
        self._used.add(socket)

    def wait(self, seconds: float) -> set[Source]:
        """Block until something is readable, or that long; not at all if it is not positive."""
        ready: set[Source] = {socket for socket in self._used if readable(socket)}
        for descriptor, _ in self._epoll.poll(0 if ready else max(seconds, 0)):
            source = self._sources[descriptor]
            if isinstance(source, int) or readable(source):
                ready.add(source)
        self._used = {source for source in ready if not isinstance(source, int)}
        return ready

    def close(self) -> None:
        """Give the `epoll` back; the sources stay open."""
        self._epoll.close()


def _descriptor(source: Source) -> int:
    return source if isinstance(source, int) else source.fileno()
