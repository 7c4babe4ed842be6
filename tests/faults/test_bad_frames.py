"""Whoever reaches a scheduler's sockets may send anything: it is refused and counted, and nobody is disturbed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import zmq

from protocol.codec import Header, encode
from tests.e2e.stack import eventually
from tests.faults.fleet import Fleet, serving
from tests.faults.load import Load
from tests.protocol.message_samples import SAMPLES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FRAMES = 2000
FLAT = 24 << 20  # bytes that a scheduler's memory may grow by, as it does under streams alone
UNSEQUENCED = encode(Header())


def garbage(rng: random.Random) -> list[bytes]:
    """Random bytes in one to four frames."""
    return [rng.randbytes(rng.randrange(200)) for _ in range(rng.randrange(1, 5))]


def truncated(rng: random.Random) -> list[bytes]:
    """A message of any kind that ends too early."""
    body = encode(rng.choice(list(SAMPLES.values())))
    return [UNSEQUENCED, body[: rng.randrange(1, len(body))]]


def nested(rng: random.Random) -> list[bytes]:
    """Arrays in arrays, a hundred thousand deep."""
    return [UNSEQUENCED, rng.choice((b"\x91", b"\x81\xa1a", b"\x92\xa5hello")) * 100_000]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Fleet, Load]]:
    with serving(streams=48, max_tokens=100) as both:
        yield both


class Attacker:
    """A DEALER of nobody, and what a scheduler's memory was before it spoke."""

    def __init__(self, running: Fleet, endpoint: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, 60_000)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.socket.connect(endpoint)
        self.scheduler = psutil.Process(running.services["scheduler-0"].popen.pid)
        self.memory = self.scheduler.memory_info().rss

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)
        self.context.term()

    def grew(self) -> int:
        return self.scheduler.memory_info().rss - self.memory


def streams_flow(load: Load) -> None:
    """Most of the streams are there, and go on."""
    chunks = load.chunks
    eventually(lambda: load.streaming > 30 and load.chunks > chunks + 100)


def endpoints(running: Fleet) -> tuple[str, str]:
    return running.frontends_endpoint, running.workers_endpoint


@pytest.mark.parametrize("make", [garbage, truncated, nested])
def test_frames_that_cannot_be_read_are_refused_and_counted(
    served: tuple[Fleet, Load], make: Callable[[random.Random], list[bytes]]
) -> None:
    running, load = served
    rng = random.Random(make.__name__)
    for endpoint in endpoints(running):

        def attack(endpoint: str = endpoint) -> None:
            counted = running.figure("scheduler-0", "wire_frame_bad")
            with Attacker(running, endpoint) as attacker:
                for _ in range(FRAMES):
                    attacker.socket.send_multipart(make(rng))
                eventually(lambda: running.figure("scheduler-0", "wire_frame_bad") >= counted + 0.9 * FRAMES)
                eventually(lambda: attacker.grew() < FLAT)  # what has been read last may still wait in the socket

        running.costs_no_session(attack)
    streams_flow(load)


def test_a_frame_of_a_hundred_megabytes_costs_its_sender_the_connection(served: tuple[Fleet, Load]) -> None:
    running, load = served
    for endpoint in endpoints(running):

        def attack(endpoint: str = endpoint) -> None:
            with Attacker(running, endpoint) as attacker:
                attacker.socket.send_multipart([UNSEQUENCED, bytes(100 << 20)])
                assert attacker.monitor.poll(60_000), "the connection was not closed"
                eventually(lambda: attacker.grew() < FLAT)

        running.costs_no_session(attack)
    streams_flow(load)


def test_replayed_frames_are_dropped_and_counted(served: tuple[Fleet, Load]) -> None:
    running, load = served
    for peer, endpoint in zip(("frontend-0", "worker-0"), endpoints(running), strict=True):
        with Attacker(running, endpoint) as attacker, attacker.context.socket(zmq.SUB) as tap:
            tap.subscribe(b"out")
            tap.connect(running.rundir.tap(peer))
            taken: list[list[bytes]] = []
            deadline = time.monotonic() + 60
            while len(taken) < 100:
                assert time.monotonic() < deadline, f"{peer} sends too little"
                if tap.poll(100):
                    _, _, *frames = tap.recv_multipart()
                    if frames[0] != UNSEQUENCED:  # a HELLO is no part of a session
                        taken.append(frames)

            def attack(attacker: Attacker = attacker, taken: list[list[bytes]] = taken) -> None:
                upto = running.figure("scheduler-0", "wire_session_stale") + len(taken)
                for frames in taken:
                    attacker.socket.send_multipart(frames)
                eventually(lambda: running.figure("scheduler-0", "wire_session_stale") >= upto)

            running.costs_no_session(attack)
    streams_flow(load)


def test_after_all_of_it_every_stream_is_right(served: tuple[Fleet, Load]) -> None:
    running, load = served
    load.finish()
    running.at_rest(expected=("wire_frame_bad",))
    running.answered(load)
    assert running.total("wire_message_bad") == 0
