"""The packaged model through the whole stack: it answers, and its answers survive the death of any service."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.e2e.stack import Stack, Streamed, eventually, stack, stream_completion

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "List three fruits and their colours.",
    "Explain what a queue is to a child.",
)


def chat(question: str, max_tokens: int = 48, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0, **more}


def ask(made: Stack, bodies: list[dict[str, Any]], meanwhile: Any = None) -> list[tuple[str, list[str]]]:
    """Stream all at once; `meanwhile` runs once tokens flow. Returns (text, finish reasons) of each.

    If the streams were over before it had run they are asked anew.
    """
    for _ in range(5):
        answers, hit = _ask(made, bodies, meanwhile)
        if hit:
            return answers
    raise AssertionError("the streams were over before the fault, each time")


def _ask(made: Stack, bodies: list[dict[str, Any]], meanwhile: Any) -> tuple[list[tuple[str, list[str]]], bool]:
    """The answers, and whether something was still streaming when `meanwhile` had run."""
    answers = [Streamed() for _ in bodies]

    def run(i: int) -> None:
        stream_completion(made.url, bodies[i], "/v1/chat/completions", timeout=200, seen=answers[i])

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    hit = meanwhile is None
    if meanwhile is not None:
        eventually(lambda: sum(answer.chunks for answer in answers) > 5 * len(bodies))
        meanwhile()
        hit = any(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(200)
    assert all(answer.error is None and answer.done == 1 for answer in answers), answers
    return [(answer.texts.get(0, ""), answer.reasons[0]) for answer in answers], hit


def test_it_knows_the_capital_of_france() -> None:
    with stack() as made:
        began = time.monotonic()
        made.up()
        print(f"ready after {time.monotonic() - began:.1f} s")
        ((text, reasons),) = ask(made, [chat(QUESTIONS[0])])
        assert "Paris" in text
        assert reasons == ["stop"]


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_answers_are_the_undisturbed_ones_after_deaths(dtype: str) -> None:
    """Greedy, packed (`auto`) and fp32: a killed worker and a killed scheduler change no byte."""
    bodies = [chat(question, 90, ignore_eos=True) for question in QUESTIONS]
    with stack() as made:
        made.up("--dtype", dtype)
        undisturbed = ask(made, bodies)
        for role in ("worker", "scheduler"):
            before = made.service(role).pid
            assert ask(made, bodies, lambda role=role: made.kill(role)) == undisturbed, role
            assert made.service(role).pid != before


def test_scarce_blocks_preempt_and_change_nothing() -> None:
    bodies = [chat(question, 120, ignore_eos=True) for question in QUESTIONS * 2]
    short = [chat(question, 2) for question in QUESTIONS * 3]
    with stack() as made:
        made.up("--dtype", "float32")
        undisturbed = ask(made, bodies)
    with stack() as made:
        made.up("--dtype", "float32", "--num-gpu-blocks", "34", "--max-model-len", "256")
        ask(made, short)  # teaches the scheduler to expect short answers, so that it admits more than will fit
        assert ask(made, bodies) == undisturbed
        eventually(lambda: made.metrics().get('pagewire_scheduler_preemptions{name="scheduler-0"}', 0) > 0)
