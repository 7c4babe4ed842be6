"""Telemetry arrives when somebody collects, and is lost without harm when nobody does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from protocol.tap import Tap
from protocol.telemetry import Collector, Publisher, Telemetry


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with zmq.Context() as context:
        yield context


def test_figures_arrive_with_the_name_of_their_service(tmp_path: Path, context: zmq.Context[Any]) -> None:
    endpoint = f"ipc://{tmp_path}/t.sock"
    collector = Collector(endpoint, context)
    publisher = Publisher(endpoint, "worker", "worker-0", 5, 6, context)
    received: list[Telemetry] = []
    deadline = time.monotonic() + 60
    while not received and time.monotonic() < deadline:
        publisher.publish({"blocks_free": 3.0})
        collector.socket.poll(50)
        received = collector.receive()
    assert received[0] == Telemetry("worker", "worker-0", 5, 6, {"blocks_free": 3.0})
    assert collector.receive() == [] or received
    publisher.close()
    collector.close()


def test_what_a_service_publishes_last_arrives(tmp_path: Path, context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.telemetry.LAST_WORDS", 60_000)  # ms; it lingers no longer than it must
    for i in range(5):
        with contextlib.closing(Collector(f"ipc://{tmp_path}/t{i}.sock", context)) as collector:
            own: zmq.Context[Any] = zmq.Context()
            publisher = Publisher(f"ipc://{tmp_path}/t{i}.sock", "worker", "worker-0", 5, 6, own)
            deadline = time.monotonic() + 60
            while not collector.receive() and time.monotonic() < deadline:
                publisher.publish({"tokens": 1.0})
                collector.socket.poll(50)
            publisher.publish({"tokens": 2.0}, pictures={"worker-0": bytes(500_000)})
            publisher.close()
            own.term()
            received: list[Telemetry] = []
            while not any(told.values == {"tokens": 2.0} for told in received):
                assert time.monotonic() < deadline, "it was lost"
                collector.socket.poll(50)
                received += collector.receive()


def test_publishing_to_nobody_never_waits(tmp_path: Path, context: zmq.Context[Any]) -> None:
    publisher = Publisher(f"ipc://{tmp_path}/nobody.sock", "worker", "worker-0", 5, 6, context)
    for _ in range(10_000):
        publisher.publish({"a": 1.0})
    publisher.close()


def test_what_is_no_telemetry_is_counted_and_survived(tmp_path: Path, context: zmq.Context[Any]) -> None:
    endpoint = f"ipc://{tmp_path}/t.sock"
    collector = Collector(endpoint, context)
    with contextlib.closing(context.socket(zmq.PUB)) as stranger:
        stranger.connect(endpoint)
        deadline = time.monotonic() + 60
        while not collector.refused and time.monotonic() < deadline:
            for frame in (b"", b"\xc1", b"\x91" * 5000, msgpack.packb(["telemetry", 1])):
                stranger.send(frame)
            collector.socket.poll(50)
            assert collector.receive() == []
    assert collector.refused > 0
    collector.close()


def test_a_tap_shows_messages_only_while_somebody_listens(tmp_path: Path, context: zmq.Context[Any]) -> None:
    endpoint = f"ipc://{tmp_path}/tap.sock"
    tap = Tap(endpoint, context)
    tap.mirror("in", [b"unseen"])
    with contextlib.closing(context.socket(zmq.SUB)) as reader:
        reader.subscribe(b"")
        reader.connect(endpoint)
        deadline = time.monotonic() + 60
        while not reader.poll(20) and time.monotonic() < deadline:
            tap.mirror("out", [b"header", b"body"])
        direction, stamp, *frames = reader.recv_multipart()
        assert (direction, frames) == (b"out", [b"header", b"body"])
        assert abs(int.from_bytes(stamp, "little") / 1e9 - time.time()) < 20
    tap.close()
    assert list(tmp_path.iterdir()) == []
