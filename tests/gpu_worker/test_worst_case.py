"""Blocks from what a card has left after its largest step: the step itself on the CPU, the card's figures played."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_worker.errors import LoadError
from gpu_worker.prompt_scores import SLICE
from gpu_worker.worst_case import Usage, blocks_that_fit, measure, worst_step
from protocol.columns import unpack
from protocol.messages import Geometry
from tests.gpu_worker.model_driver import load_tiny

GIB, MIB = 1 << 30, 1 << 20
USAGE = Usage(total=80 * GIB, free=50 * GIB, reserved=29 * GIB, peak=30 * GIB)  # 1 GiB lies outside the allocator


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(("slots", "tokens", "rows"), [(24, 1000, 24), (24, 24, 24), (24, 7, 7), (3, 1000, 3), (1, 1, 1)])
def test_the_worst_step_has_as_many_rows_and_tokens_as_a_step_can_have(slots: int, tokens: int, rows: int, long: bool) -> None:
    geometry = Geometry(16, 1, 0, slots, 100, tokens, 50000)
    step = worst_step(geometry, long)
    assert step.counts.sum() == len(step.prefill) == min(tokens, 100 * rows)
    assert len(step.output_slots) == len(step.records) == rows
    ends = step.starts + step.counts
    assert (ends == [record.prompt_length for record in step.records]).all()
    assert ends[0] == (100 if long else step.counts[0])
    assert (ends[1:] == step.counts[1:]).all()
    assert set(unpack(step.plan.assign_blocks).tolist()) == {0}
    assert len(unpack(step.plan.assign_slots)) == (-(-ends // 16)).sum()
    for record in step.records:
        record.params.check(geometry.vocab_size)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"max_num_seqs": 16, "max_num_batched_tokens": 16}, {"max_num_seqs": 1}])
def test_a_real_model_computes_it_with_a_single_block(tmp_path: Path, sizes: dict[str, int], long: bool) -> None:
    loaded = load_tiny(tmp_path, num_gpu_blocks=16, **sizes)
    geometry = loaded.description.geometry
    step = worst_step(geometry, long)
    loaded.runner.start(step)
    outcome = loaded.runner.finish(step)
    assert len(outcome.tokens) == len(step.slots)
    assert len(outcome.lp_counts) == len(step.slots)
    scored = np.maximum(step.counts - 1, 0)
    assert min(SLICE, scored.sum()) <= sum(len(score.ranks) for score in outcome.scores) < SLICE + max(1, scored.max())


def test_the_cache_fills_what_the_largest_step_and_what_comes_later_leave() -> None:
    assert USAGE.left() == 49 * GIB
    assert USAGE.left(0.9) == 41 * GIB
    assert blocks_that_fit(USAGE, 0.9, 2 * MIB, needed=256) == 41 * 512
    assert blocks_that_fit(USAGE, 0.9, 2 * MIB, needed=256, kept=GIB) == 40 * 512
    assert blocks_that_fit(USAGE, 0.9, 2 * MIB, needed=41 * 512) == 41 * 512


def test_a_card_without_room_for_one_sequence_says_what_helps() -> None:
    for share, needed in ((0.9, 41 * 512 + 1), (0.3, 1)):
        with pytest.raises(LoadError, match=r"blocks of 2048 KiB are needed .* lower --max-model-len, .* raise --gpu-mem") as refused:
            blocks_that_fit(USAGE, share, 2 * MIB, needed)
        assert "\n" not in str(refused.value)
    assert " 0 MiB are left under --gpu-memory-utilization 0.3" in str(refused.value)


def test_blocks_that_are_asked_for_need_memory_and_are_warned_of_beyond_the_share(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "worker"):
        assert blocks_that_fit(USAGE, 0.9, 2 * MIB, needed=256, asked=256) == 256
        assert not caplog.records
        assert blocks_that_fit(USAGE, 0.9, 2 * MIB, needed=256, asked=45 * 512) == 45 * 512
    assert caplog.messages == ["23040 blocks are more than the 20992 that fit under --gpu-memory-utilization 0.9"]
    with pytest.raises(LoadError, match=r"25089 blocks of 2048 KiB are asked for, .* 25088 fit; lower --num-gpu-blocks"):
        blocks_that_fit(USAGE, 0.9, 2 * MIB, needed=256, asked=49 * 512 + 1)
    with pytest.raises(LoadError, match=r"255 blocks hold no sequence of max_model_len, which needs 256: .* raise --num-gpu-blocks"):
        blocks_that_fit(USAGE, 0.9, 2 * MIB, needed=256, asked=255)


class Card:
    """Plays torch's allocator on a card of 80 GiB, 1 GiB of which lie outside it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held, self.cached, self.peak = 10 * GIB, 7 * GIB, 0
        for name in ("empty_cache", "reset_peak_memory_stats", "mem_get_info", "memory_reserved"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: self.peak)

    def take(self, size: int) -> None:
        """Temporaries, which the allocator keeps afterwards."""
        self.cached = max(self.cached, size)
        self.peak = max(self.peak, self.memory_reserved())

    def empty_cache(self) -> None:
        self.cached = 0

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.memory_reserved()

    def memory_reserved(self) -> int:
        return self.held + self.cached

    def mem_get_info(self) -> tuple[int, int]:
        return 79 * GIB - self.memory_reserved(), 80 * GIB


def test_what_was_taken_before_the_step_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    usage = measure(lambda: card.take(2 * GIB))
    assert usage == Usage(80 * GIB, 67 * GIB, 12 * GIB, 12 * GIB)
    assert usage.left(0.9) == (72 - 1 - 12) * GIB
    assert not card.cached
