"""The flight recorder keeps the last headers, writes them as text, and no content."""

from __future__ import annotations

import json
from pathlib import Path

from protocol.codec import Header, encode
from protocol.flight import KEPT, FlightRecorder
from protocol.messages import Abort, Choice, SamplingParams, Submit


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dump_names_reason_direction_peer_size_header_and_tag(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, "scheduler-0")
    frames = [encode(Header(5, 6, 7)), encode(Abort(b"r" * 16))]
    recorder.record("in", "frontend-0", frames)
    recorder.record("out", "worker-0", [encode(Header(1, 0, 2))])
    first, received, sent = lines(recorder.dump("session over: silence"))
    assert first["reason"] == "session over: silence"
    assert first["service"] == "scheduler-0"
    assert (received["direction"], received["peer"], received["frames"]) == ("in", "frontend-0", [[5, 6, 7], "abort"])
    assert received["bytes"] == sum(map(len, frames))
    assert sent["frames"] == [[1, 0, 2]]


def test_only_the_last_messages_are_kept(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, "w", length=10)
    for i in range(25):
        recorder.record("in", str(i), [b""])
    assert [line["peer"] for line in lines(recorder.dump("x"))[1:]] == [str(i) for i in range(15, 25)]


def test_no_prompt_is_written(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, "w")
    prompt = b"\x01\x02\x03\x04" * 100
    submit = Submit(b"r" * 16, 1, "secret-model", prompt, SamplingParams(8), [Choice(0, 1)])
    recorder.record("in", "f", [encode(Header(5, 6, 7)), encode(submit)])
    recorder.record("in", "f", [b"garbage that is no MessagePack" * 10, b"", b"\xc1" * 70, b"\x91", b"\xdc\0"])
    text = recorder.dump("x").read_text()
    assert "submit" in text
    assert "secret" not in text
    assert prompt[:8].hex() not in text


def test_old_dumps_are_removed(tmp_path: Path) -> None:
    recorder, other = FlightRecorder(tmp_path, "worker-0"), FlightRecorder(tmp_path, "scheduler-0")
    kept = other.dump("x")
    last = [recorder.dump("x") for _ in range(KEPT + 5)][-1]
    assert len(list(tmp_path.glob("worker-0-*"))) == KEPT
    assert last.exists()
    assert kept.exists()
