"""`pagewire top`: figures from two looks at /metrics, and the screen in a terminal over a running stack."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest
from rich.console import Console

from pagewire.top import Snapshot, busy, parse, rate, screen
from tests.e2e.stack import stack
from tests.pagewire.terminals import terminal

METRICS = """
pagewire_requests{{name="frontend-0",status="running"}} 3.0
pagewire_requests{{name="frontend-1",status="running"}} 4.0
pagewire_service{{name="worker-0",role="worker",state="ready"}} 1.0
pagewire_worker_memory_bytes{{name="worker-0"}} 104857600
pagewire_worker_epoch{{name="worker-0"}} 7
pagewire_worker_steps{{name="worker-0"}} {steps}
pagewire_worker_step_seconds{{name="worker-0"}} {step}
pagewire_worker_idle_seconds{{name="worker-0"}} {idle}
pagewire_frontend_generation_tokens{{name="frontend-0"}} 100
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{{model_name="a",name="frontend-0"}} {tokens}
vllm:generation_tokens_total{{model_name="b",name="frontend-0"}} 7
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{{model_name="a",name="frontend-0"}} {prompts}
pagewire_scheduler_prefix_hits{{name="scheduler-0"}} 25
pagewire_scheduler_prefix_queries{{name="scheduler-0"}} 100
"""
STATE = {
    "now": {"busy_share": 0.98, "gpu_utilization": 0.5, "memory_usage": 0.25},
    "minute": {"time_to_first_token": 0.0123, "time_per_output_token": 1.5},
    "totals": {"plans_in_flight": 3.0, "depth": 4.0},
    "blocks": [
        {"worker": "worker-0", "stride": 1, "cells": "3" * 5 + "2" * 15 + "1" * 30 + "0" * 50},
        {"worker": "worker-1", "stride": 20, "cells": "0" * 100},
    ],
}


def looks() -> tuple[Snapshot, Snapshot]:
    before = parse(METRICS.format(steps=100, step=5.0, idle=5.0, tokens=1000, prompts=300), at=10.0)
    return parse(METRICS.format(steps=140, step=6.5, idle=5.5, tokens=3000, prompts=340), 12.0, STATE), before


def test_rates_are_what_counters_grew_per_second() -> None:
    now, before = looks()
    assert rate(now, before, "vllm:generation_tokens") == 1000
    assert rate(before, now, "vllm:generation_tokens") == 0
    assert rate(now, Snapshot(), "vllm:generation_tokens") == 0, "one look gives no rate"
    assert busy(now, before, "worker-0") == 0.75
    assert busy(now, now, "worker-0") == 0


def test_a_counter_that_began_anew_is_no_negative_rate() -> None:
    now, before = looks()
    again = Snapshot(14.0, before.values)
    assert rate(again, now, "vllm:generation_tokens") == 0


def test_the_picture_shows_speed_services_and_blocks() -> None:
    now, before = looks()
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(screen(now, before, "http://admin", "cannot reach it"))
    lines = capture.get().splitlines()
    assert "cannot reach it" in lines[1]
    figures = next(line.split() for line in lines if line.split()[:1] == ["1,000"])
    assert figures == ["1,000", "20", "0", "7", "0", "0", "0", "25%"]
    assert next(line.split() for line in lines if "12.3 ms" in line) == ["12.3", "ms", "1.50", "s", "3", "4", "98%", "50%", "25%"]
    assert next(line.split() for line in lines if line.startswith("worker-0")) == [
        "worker-0",
        "worker",
        "ready",
        "7",
        "100",
        "MiB",
        "75%",
        "0",
        "20",
    ]
    assert [line.split("█  ")[1].strip() for line in lines if "█" in line] == [
        "5 shared 15 used 30 cached 50 free",
        "≈ 0 shared 0 used 0 cached 2,000 free",
    ]


def test_a_picture_of_nothing_has_its_title() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(screen(Snapshot(), Snapshot(), "http://admin"))
    assert "pagewire top" in capture.get()


@pytest.mark.slow
def test_in_a_terminal_it_follows_a_running_stack_until_q() -> None:
    with stack() as running:
        running.up("--runner", "oracle")
        body = {"prompt": "x" * 40, "max_tokens": 30, "ignore_eos": True}
        assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).status_code == 200
        with terminal("top", "--admin", running.admin, "--interval", "0.3") as top:
            top.read(r"worker-0 +worker +ready")
            top.read(r"worker-0 +█.*shared .*free")
            top.type("q")
            assert top.wait() == 0
        with terminal("top", "--admin", running.admin, "--interval", "0.3") as top:
            top.read(r"worker-0 +worker +ready")
            top.type("\x03")
            assert top.wait() == 0
        command = [sys.executable, "-P", "-m", "pagewire", "top", "--once", "--interval", "0.2", "--run-dir", str(running.run_dir)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert "frontend-0" in done.stdout
        assert running.admin in done.stdout


@pytest.mark.slow
def test_without_an_admin_server_it_says_so_in_one_line() -> None:
    command = [sys.executable, "-P", "-m", "pagewire", "top", "--admin", "http://127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: cannot reach http://127.0.0.1:1")
