"""The timeline: clocks that disagree are set right by cause and effect, and scheduling is seen to overlap execution."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pagewire.trace import Service, busy_share, chrome, clock_bounds, offset, services
from protocol.trace import BATCH, MOST, Span, Spans, Trace
from tests.e2e.stack import Stack
from tests.pagewire.processes import eventually


def linked(ahead: float) -> list[Spans]:
    """A scheduler and a worker whose clock is so many seconds ahead; three steps of 10 ms, 1 ms each way."""
    scheduler, worker = [], []
    for step in range(3):
        at, key = step * 0.01, f"7:{step}"
        scheduler += [Span("plans for w", "send", at, at + 0.0001, key), Span("results of w", "result", at + 0.012, at + 0.013, key)]
        worker += [
            Span("network", "receive", at + 0.001 + ahead, at + 0.001 + ahead, key),
            Span("device", "forward", at + 0.001 + ahead, at + 0.010 + ahead, key),
            Span("network", "answer", at + 0.011 + ahead, at + 0.0111 + ahead, key),
        ]
    return [Spans("worker", "w", 1, 11, worker), Spans("scheduler", "s", 2, 12, scheduler)]


@pytest.mark.parametrize("ahead", [-500.0, 3.25])
def test_a_clock_that_is_off_is_set_right_to_within_half_the_round_trip(ahead: float) -> None:
    scheduler, worker = services(linked(ahead))
    assert (scheduler.name, worker.name) == ("s", "w")
    assert abs(worker.offset - ahead) <= 0.0015
    least, most = worker.bounds
    assert least <= ahead <= most


def test_a_clock_that_may_be_right_is_left_alone() -> None:
    assert services(linked(0.0))[1].offset == 0.0
    assert offset(-float("inf"), float("inf")) == 0.0
    assert clock_bounds(Service("worker", "w", 1), []) == (-float("inf"), float("inf"))


def test_the_trace_is_cut_to_its_window_and_tells_the_busy_share() -> None:
    found = services(linked(0.0))
    trace = chrome(found, 0.005, 0.025)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            assert 0 <= event["ts"] <= event["ts"] + event["dur"] <= 20_000.001
    # forwards: 1–10, 11–20 and 21–30 ms
    assert busy_share(found[1], 0.005, 0.025) == pytest.approx((5 + 9 + 4) / 20)
    assert trace["otherData"]["busy_share"] == {"w": pytest.approx(0.9)}


def test_spans_that_overlap_count_once_as_busy() -> None:
    spans = [Span("device", "forward", 0.0, 2.0), Span("device", "forward", 1.0, 3.0), Span("device", "forward", 1.5, 1.6)]
    assert busy_share(Service("worker", "w", 1, spans), 0.0, 4.0) == pytest.approx(0.75)


def test_a_recorder_that_nobody_reads_stays_small_and_counts_what_it_lost() -> None:
    trace = Trace()
    for _ in range(MOST + 5):
        trace.note("lane", "name", 0.0, 1.0)
    assert trace.lost == 5
    batches = [len(batch) for batch in iter(trace.take, [])]
    assert sum(batches) == MOST
    assert max(batches) == BATCH


@contextlib.contextmanager
def busy(stack: Stack) -> Iterator[None]:
    """A few streams at all times."""
    over = threading.Event()

    def stream(number: int) -> None:
        body = {"prompt": f"stream {number}", "max_tokens": 30 + 9 * number, "stream": True, "ignore_eos": True}
        while not over.is_set():
            httpx.post(f"{stack.url}/v1/completions", json=body, timeout=100).raise_for_status()

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(100)


def recorded(stack: Stack, output: Path) -> dict[str, Any]:
    """What `pagewire trace` saw of one second."""
    command = [sys.executable, "-P", "-m", "pagewire", "trace", "--admin", stack.admin, "--seconds", "1", "--output", str(output)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    assert "device busy" in told
    trace: dict[str, Any] = json.loads(output.read_text())
    return trace


NAMES = {"tokenize", "queue", "plan", "send", "forward", "sample", "result", "detokenize", "receive", "request"}


def check(trace: dict[str, Any]) -> None:
    """Assert what holds for every trace."""
    timed = [event for event in trace["traceEvents"] if event["ph"] in "Xbe"]
    assert all(event["ts"] >= 0 and event.get("dur", 0) >= 0 for event in timed)
    assert [event["ph"] for event in timed].count("b") == [event["ph"] for event in timed].count("e")
    at = by_step(timed)
    assert all(begin(at["send", step]) <= end(at["forward", step]) for name, step in at if name == "forward" and ("send", step) in at)
    assert trace["otherData"]["spans_lost"] == 0
    assert trace["otherData"]["busy_share"].get("worker-0", 0.0) <= 1.0


def overlaps(trace: dict[str, Any]) -> bool:
    """Whether it is one of an undisturbed second: every service told in time what it did, and the device was kept busy by plans
    that had been made while the steps before them ran."""
    timed = [event for event in trace["traceEvents"] if event["ph"] in "Xbe"]
    at = by_step(timed)
    forwards = [step for name, step in at if name == "forward"]
    overlapping = [step for step in forwards if ("plan", step + 1) in at and end(at["plan", step + 1]) <= end(at["forward", step])]
    complete = len(forwards) >= 5 and {event["name"] for event in timed} >= NAMES
    return complete and len(overlapping) >= 0.7 * len(forwards) and trace["otherData"]["busy_share"]["worker-0"] > 0.3


def by_step(timed: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(event["name"], event["args"]["step"]): event for event in timed if "step" in event.get("args", {})}


def begin(event: dict[str, Any]) -> float:
    return float(event["ts"])


def end(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


@pytest.mark.slow
def test_plans_are_made_while_the_steps_before_them_run(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    try:
        stack.up("--runner", "simulated", "--step-time", "0.03")
        with busy(stack):

            def undisturbed() -> bool:
                trace = recorded(stack, tmp_path / "trace.json")
                check(trace)
                return overlaps(trace)

            eventually(undisturbed)
        assert httpx.get(f"{stack.admin}/trace", params={"seconds": "x"}, timeout=60).status_code == 400
    finally:
        stack.close()
