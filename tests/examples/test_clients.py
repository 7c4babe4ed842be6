"""The example programs run as a reader would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.stack import stack

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def example(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.model
def test_the_offline_script_prints_a_text_for_each_prompt() -> None:
    lines = example("offline.py").splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("'The capital of France is' -> '")
    assert all(line.endswith(("'", '"')) and not line.endswith("-> ''") for line in lines)


@pytest.mark.model
def test_the_chat_client_prints_the_answer() -> None:
    with stack() as made:
        made.up()
        assert "Paris" in example("chat_client.py", made.url, "What is the capital of France?")


def test_the_async_client_follows_three_streams_of_a_running_stack() -> None:
    with stack() as made:
        made.up("--runner", "simulated", "--step-time", "0.3")  # a program that stands still finds several steps at once
        lines = example("async_client.py", str(made.run_dir)).splitlines()
    assert len(lines) == 3
    assert all(int(line.rsplit(" in ", 1)[1].split()[0]) > 3 for line in lines)


def test_the_chat_client_without_a_question_says_how_it_is_called() -> None:
    ended = subprocess.run([sys.executable, ROOT / "examples" / "chat_client.py"], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1
    assert "chat_client.py URL QUESTION" in ended.stderr
    assert "Traceback" not in ended.stderr
