"""Telemetry: figures that services publish and the admin server collects. Lossy on purpose; never carries state."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import zmq

from protocol.endpoints import check_local
from protocol.series import Series
from protocol.trace import TOPIC, Spans, Trace

HIGH_WATER_MARK = 16  # messages; a slow collector loses the rest
LAST_WORDS = 500  # ms that the context waits at its end for what was published last, if its own thread is late


class Telemetry(msgspec.Struct, array_like=True, tag="telemetry", frozen=True):
    """One service's figures at one moment. Counters only grow within an incarnation.

    values: by name. series: samples of the families in `protocol/families.py`.
    pictures: by worker, its KV blocks in brief; a scheduler's. served: a model's name in the API, by its own; a frontend's.
    """

    role: str
    name: str
    incarnation: int
    pid: int
    values: dict[str, float]
    pictures: dict[str, bytes] = {}
    series: list[Series] = []
    served: dict[str, str] = {}


class Publisher:
    """The sending side, for one thread: connects to the collector, there or not, and never blocks.

    Raises CannotRun for an endpoint off this host: figures are not encrypted.
    """

    def __init__(self, endpoint: str, role: str, name: str, incarnation: int, pid: int, context: zmq.Context[Any]) -> None:
        check_local(endpoint, "--telemetry")
        self.trace = Trace()
        self._about = (role, name, incarnation, pid)
        self._encoder = msgspec.msgpack.Encoder()
        # An asyncio context would make an asyncio socket, whose `send` is a coroutine.
        # XPUB tells whether somebody wants spans.
        self._socket: zmq.Socket[bytes] = zmq.Socket(context, zmq.XPUB)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        # One that starts beside us or is replaced is found soon. That there is none is normal, too.
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 400)
        self._socket.connect(endpoint)

    def publish(
        self,
        values: dict[str, float],
        series: list[Series] | None = None,
        pictures: dict[str, bytes] | None = None,
        served: dict[str, str] | None = None,
    ) -> None:
        """Send the figures, by names of prometheus' alphabet, and what was traced; dropped if nobody listens or reads."""
        with contextlib.suppress(zmq.Again):
            while True:
                subscription = self._socket.recv(zmq.DONTWAIT)
                if subscription[1:] == TOPIC:
                    self.trace.on = subscription[0] == 1
        telemetry = Telemetry(*self._about, values, pictures or {}, series or [], served or {})
        with contextlib.suppress(zmq.Again):
            self._socket.send(self._encoder.encode(telemetry), zmq.DONTWAIT)
            while spans := self.trace.take():
                lost, self.trace.lost = self.trace.lost, 0
                self._socket.send(TOPIC + self._encoder.encode(Spans(*self._about, spans, lost)), zmq.DONTWAIT)

    def close(self) -> None:
        """Close the socket. What was published last still goes out, if somebody reads."""
        self._socket.close(linger=LAST_WORDS)


class Collector:
    """The receiving side, for one thread: binds, and is read when the poller says so. The caller guards the endpoint.

    Raises CannotRun as `Publisher` does.
    """

    def __init__(self, endpoint: str, context: zmq.Context[Any]) -> None:
        check_local(endpoint, "--telemetry")
        self._decoder = msgspec.msgpack.Decoder(Telemetry)
        self._span_decoder = msgspec.msgpack.Decoder(Spans)
        self.spans: list[Spans] = []  # received while `trace` is on
        self.socket: zmq.Socket[bytes] = zmq.Socket(context, zmq.SUB)
        self.socket.setsockopt(zmq.RCVHWM, 1000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, 1 << 20)
        self.socket.subscribe(b"")
        self.socket.bind(endpoint)
        self.refused = 0  # messages that were no telemetry

    def trace(self, on: bool) -> None:
        """Let all services publish spans from their next message on, or no longer."""
        self.spans = []
        self.socket.setsockopt(zmq.SUBSCRIBE if on else zmq.UNSUBSCRIBE, TOPIC)

    def receive(self) -> list[Telemetry]:
        """What has arrived since the last call, oldest first."""
        received = []
        with contextlib.suppress(zmq.Again):
            while True:
                try:
                    message = self.socket.recv(zmq.DONTWAIT)
                    if message.startswith(TOPIC):
                        self.spans.append(self._span_decoder.decode(message[len(TOPIC) :]))
                    else:
                        received.append(self._decoder.decode(message))
                except (msgspec.DecodeError, RecursionError):
                    self.refused += 1
        return received

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
