"""Steps whose rows share prefixes, with items of the attention that serve several rows: against float64 and against the same without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.gpu_player import Player, Sequence
from gpu_worker.loading.config import ModelConfig
from tests.gpu_worker.cuda.reference import error
from tests.gpu_worker.cuda.test_engine import CONFIGS, QWEN3, make, prompts, teacher

FAMILIES = [(300, 11), (0, 2), (161, 5), (700, 4)]  # tokens of a prefix, rows that begin with it; they stand together in a step


def play(player: Player, config: ModelConfig, **params: object) -> list[Sequence]:
    """All rows, their prompts computed: the first of a family by itself, so that the others find its blocks."""
    rows: list[Sequence] = []
    for number, (length, count) in enumerate(FAMILIES):
        (prefix,) = prompts([length], config.vocab_size)
        prefix = (prefix + number) % config.vocab_size
        owns = prompts([20 + 9 * i for i in range(count)], config.vocab_size)
        first = player.add(np.concatenate((prefix, owns[0])), 40, **params)
        player.prefill([first])
        rest = [player.add(np.concatenate((prefix, own)), 40, reuse=first[0], keep=length, **params) for own in owns[1:]]
        player.prefill(rest)
        rows += [first[0], *(sequence for sequence, _ in rest)]
    player.settle()
    return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_share_a_prefix_match_float64_packed_or_not(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    if config.head_dim * dtype.itemsize > 512:
        pytest.skip("a head must fit a warp")
    for packed in (True, False):
        engine, source = make(config, dtype, pack_prefixes=packed)
        player = Player(engine, depth=1)
        rows = play(player, config)
        for steps in range(3):  # eager, captured, replayed
            player.decode(rows, 1)
            player.settle()
            items = engine.state.items[: engine.state.items_launched(len(rows))]
            groups = items[items[:, 3] == 0]
            pack = 16 // (config.heads // config.kv_heads)
            assert (int(groups[:, 7].max()) == min(pack, 11)) if packed else not len(groups)
            assert not engine.forward.attention.arrivals.any()
            full = [np.concatenate((s.prompt, s.tokens)).astype(np.int32)[:-1] for s in rows]
            want, bound = teacher(config, source, dtype, full, -1)
            assert error(engine.forward.logits[: len(rows)], want) < 2 * bound, (packed, steps)


def test_graphs_of_packed_steps_change_no_bit() -> None:
    tokens = []
    for graphs in (True, False):
        engine, _ = make(QWEN3, torch.bfloat16, pack_prefixes=True, graphs=graphs)
        player = Player(engine)
        rows = play(player, QWEN3, temperature=0.7)
        player.decode(rows, 30)
        player.settle()
        tokens.append([s.tokens for s in rows])
    assert tokens[0] == tokens[1]
    assert all(len(t) == 31 for t in tokens[0])


def test_a_row_of_a_group_that_ends_leaves_the_others_alone() -> None:
    engine, source = make(QWEN3, torch.bfloat16, pack_prefixes=True)
    player = Player(engine, depth=1)
    rows = play(player, QWEN3)
    engine.state.dead[rows[3].slot] = 1
    torch.cuda.synchronize()
    player.decode(rows, 1)
    player.settle()
    live = [i for i in range(len(rows)) if i != 3]
    want, bound = teacher(
        QWEN3, source, torch.bfloat16, [np.concatenate((rows[i].prompt, rows[i].tokens[:-1])).astype(np.int32) for i in live], -1
    )
    assert error(engine.forward.logits[live], want) < 2 * bound


def test_few_rows_are_not_packed() -> None:
    engine, _ = make(QWEN3, torch.bfloat16, pack_prefixes=True)
    player = Player(engine, depth=1)
    rows = play(player, QWEN3)[:8]
    player.decode(rows, 1)
    player.settle()
    assert not (engine.state.items[: engine.state.items_launched(8), 3] == 0).any()
