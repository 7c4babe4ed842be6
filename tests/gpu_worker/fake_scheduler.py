"""A scheduler for tests of the worker's process: a `Listener` behind a real ROUTER, and a list of what arrived."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TypeVar

import zmq

from protocol.counters import Counters
from protocol.listener import WORKERS, Greeted, Listener, PeerClosed, PeerMessage
from protocol.messages import Hello, Message
from protocol.sockets import Context, received
from protocol.times import Times

M = TypeVar("M", bound=Message)
KEY = b"sixteen bytes ..".ljust(16)
SILENCE = 5.0  # seconds, also of the window: a worker or a test that stands still for less keeps its session


class FakeScheduler:
    """Welcomes every worker. Call `until` to let time pass; `messages`, `hellos` and `closed` hold what came."""

    def __init__(self, endpoint: str, epoch: int = 1, times: Times | None = None) -> None:
        self.context: Context = zmq.Context()
        # Without ZeroMQ's heartbeats, which end the connection of who stands still for 0.6 s.
        self.socket: zmq.Socket[bytes] = zmq.Socket(self.context, zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.bind(endpoint)
        self.listener = Listener(times or Times(silence=SILENCE, window=SILENCE), Counters(), lambda: secrets.randbits(62) | 1)
        self.epoch = epoch
        self.key = KEY
        self.session = 0
        self.refusal = ""  # the answer to every HELLO, if any
        self.hellos: list[Hello] = []
        self.messages: list[Message] = []
        self.closed: list[PeerClosed] = []

    def close(self) -> None:
        self.socket.close()
        self.context.term()

    def send(self, message: Message) -> None:
        self.listener.send(self.session, message, time.monotonic())
        self.transmit()

    def until(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        """Run until the condition holds. Fails the test after `seconds`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited in vain; came: {self.messages[-5:]}, closed: {self.closed}"
            self.turn()

    def expect(self, kind: type[M], seconds: float = 60.0) -> M:
        """The next message of this kind; earlier ones of other kinds are dropped."""
        found: list[M] = []

        def look() -> bool:
            while self.messages and not found:
                message = self.messages.pop(0)
                if isinstance(message, kind):
                    found.append(message)
            return bool(found)

        self.until(look, seconds)
        return found[0]

    def turn(self) -> None:
        self.socket.poll(10)
        for route, *frames in received(self.socket):
            for event in self.listener.receive((WORKERS, route), frames, time.monotonic()):
                match event:
                    case Greeted(hello=hello):
                        self.hellos.append(hello)
                        if self.refusal:
                            self.listener.refuse(event, self.refusal)
                            continue
                        self.session, events = self.listener.welcome(event, self.epoch, self.key, 0, time.monotonic())
                        self.closed += [e for e in events if isinstance(e, PeerClosed)]
                    case PeerMessage(message=message):
                        self.messages.append(message)
                    case PeerClosed():
                        self.closed.append(event)
        for event in self.listener.tick(time.monotonic()):
            if isinstance(event, PeerClosed):
                self.closed.append(event)
        self.transmit()

    def transmit(self) -> None:
        out = self.listener.out
        while out:
            (_, route), frames = out.popleft()
            try:
                self.socket.send_multipart([route, *frames], zmq.DONTWAIT)
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
