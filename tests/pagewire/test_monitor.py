"""The rolling monitor and the summary, against counters that are known."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import msgspec
import pytest

from pagewire import handover
from pagewire.metrics import FORGET
from pagewire.monitor import APART, WINDOW, Monitor, Sums
from protocol.rundir import RunDir
from protocol.telemetry import Telemetry
from tests.e2e.stack import Stack, eventually, stack
from tests.faults.test_replace import command

UNHURRIED = ("--shutdown-timeout", "600")  # whoever takes its time at the end is waited for, and its last figures with it


def worker(incarnation: int, tokens: float, busy: float, lived: float = 0.0) -> Telemetry:
    values = {"worker_tokens": tokens, "worker_step_seconds": busy, "worker_seconds": lived}
    return Telemetry("worker", "worker-0", incarnation, 1, values)


def frontend(finished: float, seconds: float, failed: float = 0.0) -> Telemetry:
    return Telemetry("frontend", "frontend-0", 1, 1, {"requests_finished": finished, "request_seconds": seconds, "requests_failed": failed})


def scheduler(queries: float, hits: float, used: float, name: str = "scheduler-0") -> Telemetry:
    return Telemetry("scheduler", name, 1, 1, {"prefix_queries": queries, "prefix_hits": hits, "blocks": 100.0, "blocks_used": used})


def test_samples_of_many_readers_are_as_few_as_those_of_none() -> None:
    monitor = Monitor(0.0)
    for tenth in range(1, 1001):
        monitor.take(worker(1, float(tenth), 0.0))
        monitor.sample(tenth / 10)
    assert len(monitor._samples) <= WINDOW / APART + 3
    assert monitor.figures()["throughput"] == pytest.approx(10.0)
    assert monitor.figures()["window_seconds"] == pytest.approx(WINDOW, abs=APART)


def test_figures_are_those_of_the_window_and_the_summary_those_of_the_whole_time() -> None:
    monitor = Monitor(0.0)
    for second in range(1, 201):
        fast = max(0, second - 100)
        monitor.take(worker(1, 10.0 * second + 90.0 * fast, 0.5 * second, second))
        monitor.take(frontend(float(second), 2.0 * second + 2.0 * fast))
        monitor.take(scheduler(100.0 * second, 25.0 * second, 30.0))
        monitor.sample(float(second))
    figures = monitor.figures()
    assert figures["window_seconds"] == WINDOW
    assert figures["throughput"] == pytest.approx(100.0)
    assert figures["latency"] == pytest.approx(4.0)
    assert figures["gpu_utilization"] == pytest.approx(0.5)
    assert figures["memory_usage"] == pytest.approx(0.3)
    assert figures["cache_hit_rate"] == pytest.approx(0.25)
    summary = monitor.summary(200.0)
    assert summary["avg_throughput"] == pytest.approx(55.0)
    assert summary["avg_latency"] == pytest.approx(3.0)
    assert summary["total_requests"] == 200
    assert summary["total_time"] == 200.0


def test_a_worker_that_is_replaced_loses_no_counts_and_its_absence_is_not_idleness() -> None:
    monitor = Monitor(0.0)
    for second in range(1, 11):
        monitor.take(worker(1, 10.0 * second, 1.0 * second, second))
    for second in range(50, 60):
        monitor.take(worker(2, 10.0 * (second - 49), 1.0 * (second - 49), second - 49))
    monitor.sample(60.0)
    assert monitor.figures()["throughput"] == pytest.approx(200 / 60)
    assert monitor.figures()["gpu_utilization"] == 1.0


def test_what_a_service_did_before_the_monitor_began_is_not_counted() -> None:
    monitor = Monitor(0.0, lambda telemetry: True)
    monitor.take(worker(1, 1000.0, 100.0))
    monitor.take(worker(1, 1010.0, 100.5))
    monitor.sample(2.0)
    assert monitor.figures()["throughput"] == pytest.approx(5.0)


def test_a_worker_s_time_begins_with_it_and_not_when_it_is_first_heard() -> None:
    monitor = Monitor(0.0)
    monitor.take(worker(1, 10.0, 1.0, lived=4.0))
    monitor.sample(4.0)
    assert monitor.figures()["gpu_utilization"] == pytest.approx(0.25)
    assert monitor.summary(4.0)["avg_gpu_utilization"] == pytest.approx(0.25)


def test_a_monitor_goes_on_from_another_s_sums() -> None:
    first = Monitor(0.0)
    first.take(worker(1, 100.0, 5.0, 10.0))
    second = Monitor(12.0, lambda telemetry: True, msgspec.json.decode(msgspec.json.encode(first.sums(10.0)), type=Sums))
    second.take(worker(1, 120.0, 6.0, 12.0))
    second.sample(12.0)
    assert second.figures()["throughput"] == pytest.approx(10.0)
    assert second.figures()["window_seconds"] == 2.0
    assert second.summary(12.0)["avg_throughput"] == pytest.approx(10.0)
    assert second.summary(12.0)["total_time"] == 12.0


def test_sums_are_left_for_a_successor_of_the_same_starter_alone(tmp_path: Path) -> None:
    path = tmp_path / "monitor.json"
    assert handover.take_up(path) is None
    sums = Monitor(1.0).sums(2.0)
    handover.leave(path, sums)
    assert handover.take_up(path) == sums
    assert handover.take_up(path) is None
    handover.leave(path, sums)
    code = f"import sys, pathlib; from pagewire import handover; sys.exit(handover.take_up(pathlib.Path({str(path)!r})) is not None)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    assert not path.exists()


def test_the_blocks_of_a_scheduler_that_is_no_longer_heard_are_forgotten() -> None:
    monitor = Monitor(0.0)
    for second in range(1, 60):
        if second <= 20:
            monitor.take(scheduler(0.0, 0.0, 90.0))
        if second >= 15:
            monitor.take(scheduler(0.0, 0.0, 10.0, "the-standby"))
        monitor.sample(float(second))
        used = monitor.figures()["memory_usage"]
        if second < 15:
            assert used == pytest.approx(0.9)
        elif second < 19 + FORGET:
            assert used == pytest.approx(0.5)
        elif second > 20 + FORGET:
            assert used == pytest.approx(0.1)


def test_nothing_having_happened_is_no_error() -> None:
    monitor = Monitor(5.0)
    assert set(monitor.figures().values()) == {0.0}
    assert set(monitor.summary(5.0).values()) == {0.0}


@pytest.mark.slow
def test_the_hit_rate_of_a_repeated_prompt_is_that_of_the_schedulers_counters_and_the_end_sums_up(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    try:
        up = stack.up("--runner", "oracle", *UNHURRIED)
        body = {"prompt": "the same prompt, asked again and again, " * 4, "max_tokens": 8, "ignore_eos": True, "stream": True}
        for _ in range(4):
            httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60).raise_for_status()

        def counted() -> dict[str, float] | None:
            figures = stack.metrics()
            found = {name: figures.get(f'pagewire_scheduler_prefix_{name}{{name="scheduler-0"}}', 0.0) for name in ("hits", "queries")}
            return found if found["queries"] == 4 * len(body["prompt"]) else None  # type: ignore[arg-type]

        counts = eventually(counted)

        def heard() -> dict[str, float] | None:
            figures: dict[str, float] = httpx.get(f"{stack.admin}/monitor", timeout=60).json()
            return figures if figures["latency"] and figures["throughput"] else None  # of the frontend, and of the worker

        seen = eventually(heard)
        assert counts["hits"] > 0
        assert seen["cache_hit_rate"] == pytest.approx(counts["hits"] / counts["queries"])
        assert {"throughput", "latency", "gpu_utilization", "memory_usage", "cache_hit_rate"} <= set(seen)
        httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60).raise_for_status()  # just before the end
        up.popen.send_signal(signal.SIGTERM)
        assert up.popen.wait(60) == 0
        found = re.search(r"^summary (\{.*\})$", up.output(), re.MULTILINE)
        assert found is not None, up.output()
        summary = json.loads(found[1])
        assert summary["total_requests"] == 5
        assert summary["avg_throughput"] * summary["total_time"] == pytest.approx(5 * 8, abs=0.1), "what was sampled last is missing"
        assert summary["avg_latency"] > 0
        assert summary["total_time"] > 0
        assert set(summary) == {"avg_throughput", "avg_latency", "avg_gpu_utilization", "total_requests", "total_time"}
    finally:
        stack.close()


def all_are_heard(made: Stack) -> bool:
    """Whether the admin server that now runs has heard every other service."""
    others = [record for record in RunDir(made.run_dir).services() if record.role != "admin"]
    return {f'pagewire_process_memory_bytes{{name="{record.name}",role="{record.role}"}}' for record in others} <= made.metrics().keys()


@pytest.mark.slow
def test_a_rolled_stack_sums_up_once_and_everything() -> None:
    with stack() as made:
        up = made.up("--runner", "oracle", *UNHURRIED)
        body = {"prompt": "x", "max_tokens": 8, "ignore_eos": True}
        for _ in range(3):
            httpx.post(f"{made.url}/v1/completions", json=body, timeout=60).raise_for_status()
        eventually(lambda: all_are_heard(made))
        assert command(made, "roll").returncode == 0
        eventually(lambda: all_are_heard(made))
        httpx.post(f"{made.url}/v1/completions", json=body, timeout=60).raise_for_status()
        up.popen.send_signal(signal.SIGTERM)
        assert up.popen.wait(60) == 0
        [summary] = re.findall(r"(?m)^summary (\{.*\})$", up.output())
        figures = json.loads(summary)
        assert figures["total_requests"] == 4
        assert figures["avg_throughput"] * figures["total_time"] == pytest.approx(4 * 8, abs=0.1)
        assert not (made.run_dir / "monitor.json").exists()
