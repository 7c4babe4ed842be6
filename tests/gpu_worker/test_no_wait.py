"""Sampling never waits for the device, whatever its rows ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gpu_worker.logprobs import PromptScores
from gpu_worker.prompt_scores import SLICE, Asked
from gpu_worker.runner import Record
from gpu_worker.sampler import Sampler
from gpu_worker.stops import SlotEnds
from gpu_worker.transfer import Arrival, upload
from protocol.columns import pack, pack_floats
from protocol.messages import SamplingParams
from tests.gpu_worker.no_wait import META, Copies

VOCAB = 5000  # more than top-p looks at first

ROWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 5},
    {"top_p": 0.9},
    {"top_p": 0.9, "top_k": 20, "min_p": 0.1},
    {"logprobs": 4},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.3},
    {"bias_ids": pack([4, 5]), "bias_values": pack_floats([1.0, -2.0])},
    {"allowed_ids": pack([1, 2, 3]), "temperature": 0.0},
    {"bad_words": [pack([4]), pack([1, 2, 3])]},
    {"stop_ids": pack(range(40)), "min_tokens": 20},
]


def record(i: int, params: dict[str, Any]) -> Record:
    return Record(i, np.arange(1, 6, dtype=np.int32), np.array([9, 9], np.int32), i, SamplingParams(50, **params), 4096)


def step_of(rows: list[dict[str, Any]]) -> tuple[Copies, Arrival]:
    """The copies of a step after one with the same rows, and what it sends to the host."""
    n = len(rows)
    sampler, ends = Sampler(n, VOCAB, META), SlotEnds(n, META)
    slots, positions = np.arange(n, dtype=np.int32), np.full(n, 7, np.int32)
    with Copies():
        for slot, params in enumerate(rows):
            sampler.bind(slot, record(slot, params))
            ends.bind(slot, record(slot, params))
    for _ in range(2):
        with Copies() as copies:
            sampled = sampler.sample(torch.zeros(n, VOCAB, device=META), slots, positions)
            settled = ends.settle(sampler.on_device(slots), sampled.tokens)
            arrival = Arrival(*settled, *(sampled.told.tensors if sampled.told else ()))
    return copies, arrival


@pytest.mark.parametrize("i", range(len(ROWS)))
def test_no_parameter_makes_a_step_wait(i: int) -> None:
    copies, _ = step_of([ROWS[i]])
    assert copies.out == 1
    assert copies.in_ <= 2, "positions, and stop ids while they are banned"


def test_a_batch_with_every_parameter_goes_to_the_host_in_one_copy() -> None:
    copies, arrival = step_of(ROWS)
    assert copies.out == 1
    assert copies.in_ == 2
    assert [a.shape for a in arrival.read()] == [(11,), (11,), (1, 5), (1, 5), (1,)]


def test_a_greedy_batch_sends_nothing_to_the_device() -> None:
    assert step_of([{"temperature": 0.0, "stop_ids": pack([2])}] * 8)[0].in_ == 0


def test_log_probabilities_of_prompts_are_computed_without_a_wait() -> None:
    n = SLICE + 7
    column = np.arange(n, dtype=np.int32)
    asked = Asked(np.zeros(n, np.int32), column + 1, column.astype(np.int64), column, np.full(n, 3, np.int32))
    with Copies() as copies:
        (tokens,) = upload(META, asked.tokens.astype(np.int64))
        scores = PromptScores(asked, tokens, lambda part: torch.zeros(part.stop - part.start, VOCAB, device=META))
    assert (copies.in_, copies.out) == (1, 1)
    assert [len(s.ranks) for s in scores.read()] == [SLICE, 7]


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: torch.arange(3).to(META),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_the_judge_sees_what_waits(waits: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), Copies():
        waits(torch.zeros(3, device=META))
