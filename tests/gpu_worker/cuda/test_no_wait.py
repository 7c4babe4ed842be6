"""On a card: the main thread never waits for it, whatever is sampled, and the draws are those of the CPU worker's sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_player import Player
from gpu_worker.runner import Record
from gpu_worker.sampler import Sampler
from gpu_worker.transfer import Arrival
from protocol.columns import pack, pack_floats
from tests.gpu_worker.cuda.test_engine import QWEN3, EngineRunner, make, prompts
from tests.gpu_worker.model_driver import Loaded
from tests.gpu_worker.test_prompt_scores import score

ROWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "logprobs": 2},
    {"temperature": 1.0, "repetition_penalty": 1.7, "frequency_penalty": 0.9, "presence_penalty": 0.1},
    {"temperature": 1.0, "bias_ids": pack([4, 5]), "bias_values": pack_floats([9.0, -2.0])},
    {"temperature": 1.0, "allowed_ids": pack(range(0, 2000, 7)), "logprobs": 0},
    {"temperature": 1.0, "bad_words": [pack([4]), pack([1, 2, 3])]},
    {"temperature": 1.0, "stop_ids": pack(range(0, 100, 2)), "min_tokens": 3},
]


@pytest.fixture
def waits_raise() -> Iterator[None]:
    """torch raises where an operation would wait for the card; waiting for an event stays allowed."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_arrives_is_read_behind_the_work_that_made_it() -> None:
    numbers = torch.zeros(1000, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # clock cycles
    numbers += 7
    assert (Arrival(numbers).read()[0] == 7).all()


@pytest.mark.parametrize("depth", [1, 3])
def test_no_step_waits_and_rows_do_not_disturb_one_another(depth: int, request: pytest.FixtureRequest) -> None:
    engine, _ = make(QWEN3, torch.bfloat16)
    texts = prompts([30 + i for i in range(len(ROWS))], QWEN3.vocab_size)
    together = Player(engine, depth=depth)
    new = [together.add(text, 20, **params) for text, params in zip(texts, ROWS, strict=True)]
    request.getfixturevalue("waits_raise")
    together.prefill(new)
    together.decode([s for s, _ in new], 19)
    together.settle()
    torch.cuda.set_sync_debug_mode("default")
    engine, _ = make(QWEN3, torch.bfloat16)
    steady = Player(engine, depth=1)
    again = [steady.add(text, 20, **params) for text, params in zip(texts, ROWS, strict=True)]
    steady.prefill(again)
    steady.decode([s for s, _ in again], 19)
    steady.settle()
    assert [s.tokens for s, _ in new] == [s.tokens for s, _ in again]


def test_prompts_are_scored_without_a_wait(request: pytest.FixtureRequest) -> None:
    engine, _ = make(QWEN3, torch.bfloat16)
    runner = EngineRunner(engine)
    loaded = Loaded(runner, runner.load())
    texts = [t.tolist() for t in prompts([40, 300], QWEN3.vocab_size)]
    before = score(loaded, texts, [3, 3])
    engine.reset()
    request.getfixturevalue("waits_raise")
    loaded.runner.reset = lambda: None  # type: ignore[method-assign]
    assert score(loaded, texts, [3, 3]) == before


@pytest.mark.parametrize("kernel", [False, True])
def test_every_parameter_draws_what_the_cpu_draws_from_the_same_logits(kernel: bool) -> None:
    engine, _ = make(QWEN3, torch.bfloat16, filter_kernel=kernel)
    vocab = QWEN3.vocab_size
    player = Player(engine, depth=1)
    texts = prompts([30 + i for i in range(len(ROWS))], vocab)
    new = [player.add(text, 20, **params) for text, params in zip(texts, ROWS, strict=True)]
    sampler = Sampler(32, vocab, torch.device("cpu"))
    for i, (s, admit) in enumerate(new):
        sampler.bind(i, Record(i, s.prompt, np.zeros(0, np.int32), admit.seed, admit.params, 1536))
    player.prefill(new)
    player.settle()
    slots = np.arange(len(ROWS), dtype=np.int32)
    live = np.ones(len(ROWS), bool)
    for k in range(8):
        if k:
            player.decode([s for s, _ in new], 1)
            player.settle()
        live &= [len(s.tokens) == k + 1 for s, _ in new]
        positions = np.array([len(s.prompt) + k for s, _ in new], np.int32)
        want = sampler.sample(engine.forward.logits[: len(ROWS)].float().cpu(), slots, positions).tokens.numpy()
        assert [s.tokens[-1] for (s, _), alive in zip(new, live, strict=True) if alive] == want[live].tolist(), k
