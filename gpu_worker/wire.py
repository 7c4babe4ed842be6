"""The worker's sockets: per scheduler two DEALERs, one for plans and one for results, and a monitor beside each.

All belong to the network thread. The Dialer says what goes where; here frames are moved, and shown to tap and flight
recorder.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import zmq

from protocol.counters import Counters
from protocol.flight import FlightRecorder
from protocol.keys import ClientKeys
from protocol.poller import Poller, Source
from protocol.service import CannotRun
from protocol.sockets import RETRY_REFUSED, Context, Socket, dealer, monitor, news, received, send
from protocol.tap import Tap

log = logging.getLogger("worker")

CHANNELS = 2
FAREWELL = 100  # ms that the last results may take to leave; a scheduler that is gone holds nothing up


class Wire:
    """Connected sockets and their poller; `watched` are further descriptors that end a wait. Raises CannotRun."""

    def __init__(
        self,
        context: Context,
        endpoints: Sequence[str],
        watched: Sequence[int],
        tap: Tap,
        flight: FlightRecorder,
        counters: Counters,
        keys: ClientKeys | None = None,
    ) -> None:
        self._context = context
        self._endpoints = endpoints
        self._counters = counters
        self._keys = keys
        self._retries: dict[tuple[int, int], float] = {}  # refused sockets, and when another one tries
        self._told: set[int] = set()  # endpoints whose refusal stands in the log
        self._tap = tap
        self._flight = flight
        self._poller = Poller()
        self._sockets: dict[tuple[int, int], tuple[Socket, Socket]] = {}  # (endpoint, channel) → socket and its monitor
        self._ready: set[Source] = set()
        self._poller.register(*watched)
        for endpoint, name in enumerate(endpoints):
            try:
                for channel in range(CHANNELS):
                    self._connect(endpoint, channel)
            except zmq.ZMQError as error:
                self.close()
                raise CannotRun(f"cannot connect to the scheduler at {name}: {error.strerror}") from None

    def wait(self, seconds: float) -> None:
        """Block until something is readable, or that long; not at all if it is not positive."""
        if self._retries:
            seconds = min(seconds, min(self._retries.values()) - time.monotonic())
        self._ready = self._poller.wait(seconds)
        for (endpoint, channel), at in list(self._retries.items()):
            if time.monotonic() >= at:
                self.renew(endpoint, channel)

    def is_ready(self, fd: int) -> bool:
        """Whether a watched descriptor ended the last wait."""
        return fd in self._ready

    def unwatch(self, fd: int) -> None:
        """Wait for this descriptor no more."""
        self._poller.unregister(fd)

    def arrived(self) -> Iterator[tuple[int, int, list[bytes] | None]]:
        """What the last wait found: (endpoint, channel, frames), and None for frames where the connection was lost.

        A lost connection's socket is read dry first.
        """
        for (endpoint, channel), (socket, watch) in list(self._sockets.items()):
            if socket in self._ready or watch in self._ready:
                for frames in received(socket):
                    self._show("in", endpoint, frames)
                    yield endpoint, channel, frames
            if watch in self._ready:
                change = news(watch)
                if change.refused:
                    self._refused(endpoint, channel, change.refused)
                if change.lost:
                    yield endpoint, channel, None

    def send(self, endpoint: int, channel: int, frames: list[bytes]) -> bool:
        """Send without waiting; False if there is no connection, or no room."""
        self._show("out", endpoint, frames)
        socket = self._sockets[endpoint, channel][0]
        self._poller.used(socket)
        return send(socket, frames)

    def renew(self, endpoint: int, channel: int) -> None:
        """Close a socket, with what lies in it, and connect a new one."""
        self._disconnect(endpoint, channel)
        self._connect(endpoint, channel)

    def close(self) -> None:
        """Close all sockets; what was sent last has a moment to leave."""
        for endpoint, channel in list(self._sockets):
            self._sockets[endpoint, channel][0].setsockopt(zmq.LINGER, FAREWELL)
            self._disconnect(endpoint, channel)
        self._poller.close()

    def _refused(self, endpoint: int, channel: int, times: int) -> None:
        """ZeroMQ gives a refused socket up; the key may be let in later, so another one tries, slowly."""
        self._retries.setdefault((endpoint, channel), time.monotonic() + RETRY_REFUSED)
        self._counters.add("connection_refused", times)
        if endpoint not in self._told:
            self._told.add(endpoint)
            log.error("the scheduler at %s lets nobody in with this key (--key-file, --server-key)", self._endpoints[endpoint])

    def _show(self, direction: str, endpoint: int, frames: list[bytes]) -> None:
        self._flight.record(direction, self._endpoints[endpoint], frames)
        self._tap.mirror(direction, frames)

    def _connect(self, endpoint: int, channel: int) -> None:
        socket = dealer(self._context, self._endpoints[endpoint], self._keys)
        watch = monitor(socket)
        self._sockets[endpoint, channel] = (socket, watch)
        self._poller.register(socket, watch)

    def _disconnect(self, endpoint: int, channel: int) -> None:
        socket, watch = self._sockets.pop((endpoint, channel))
        self._retries.pop((endpoint, channel), None)
        self._poller.unregister(socket)
        self._poller.unregister(watch)
        socket.disable_monitor()
        watch.close()  # the last wait's findings may still hold it, and an open socket holds up the context's end
        socket.close()
