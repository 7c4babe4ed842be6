"""The tap: a service's messages, mirrored to whoever asks. Costs a clock reading a message while nobody does."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import zmq

from protocol.locks import Guard

LOOK_EVERY = 1.0  # seconds between two looks for subscribers while there are none
HIGH_WATER_MARK = 1000  # messages; a slow reader loses the rest


class Tap:
    """An XPUB socket in the run directory that is silent until somebody subscribes.

    A mirrored message is `[direction, time in ns as 8 little-endian bytes, frame, …]`, as sent or received. May be
    used from several threads. Raises Busy if the endpoint is taken.
    """

    def __init__(self, endpoint: str, context: zmq.Context[Any]) -> None:
        self._guard = Guard(endpoint)
        self._lock = threading.Lock()
        self._socket: zmq.Socket[bytes] = zmq.Socket(context, zmq.XPUB)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        self._subscribers = 0
        self._look = 0.0

    def mirror(self, direction: str, frames: Sequence[bytes]) -> None:
        """Show a message to the subscribers, if any. `direction` is `in` or `out`. Never blocks."""
        now = time.monotonic()
        if not self._subscribers and now < self._look:
            return
        with self._lock:
            if now >= self._look:
                self._look = now + LOOK_EVERY
                self._count()
            if self._subscribers:
                with contextlib.suppress(zmq.Again):
                    self._socket.send_multipart([direction.encode(), time.time_ns().to_bytes(8, "little"), *frames], zmq.DONTWAIT)

    def _count(self) -> None:
        """Read who came and who went."""
        with contextlib.suppress(zmq.Again):
            while True:
                change = self._socket.recv(zmq.DONTWAIT)
                self._subscribers = max(0, self._subscribers + (1 if change[:1] == b"\x01" else -1))

    def close(self) -> None:
        """Close the socket and remove its file."""
        with self._lock:
            self._socket.close()
            self._guard.release()
