"""Paged attention in torch: against a plain softmax, in bits that nothing around a row changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.attention import torch_backend, units
from gpu_worker.attention.interface import CacheShape, Rows, new_cache
from gpu_worker.attention.scoring import Scoring
from gpu_worker.attention.torch_backend import TorchAttention

CPU = torch.device("cpu")
LENGTH = 700


class Sequences:
    """Random queries, keys and values of some sequences, and attention over any cut of them."""

    def __init__(self, n: int, heads: int = 6, kv_heads: int = 2, dim: int = 16, scoring: Scoring | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        self.q = torch.randn(n, LENGTH, heads, dim, generator=generator)
        self.kv = torch.randn(n, LENGTH, 2 * kv_heads, dim, generator=generator)
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.scoring = scoring or Scoring(dim**-0.5)

    def attention(self, block_size: int, blocks: int) -> tuple[TorchAttention, torch.Tensor]:
        shape = CacheShape(1, blocks, self.kv_heads, block_size, self.dim)
        cache = new_cache(shape, CPU, torch.float32)
        return TorchAttention(cache, shape, self.heads, [self.scoring]), cache

    def step(
        self, attention: TorchAttention, rows: list[tuple[int, int, int]], tables: np.ndarray, dead: list[int] | None = None
    ) -> torch.Tensor:
        """rows: (sequence, start, stop). Returns [tokens, heads · dim]."""
        sequences = [s for s, _, _ in rows]
        starts, stops = (np.array([row[i] for row in rows], np.int32) for i in (1, 2))
        attention.begin(Rows(starts, stops - starts, tables[sequences], np.isin(np.arange(len(rows)), dead or [])))
        q, kv = (torch.cat([x[s, start:stop] for s, start, stop in rows]) for x in (self.q, self.kv))
        return attention.attend(0, q, kv)

    def reference(self, sequence: int, start: int, stop: int) -> torch.Tensor:
        """In float64, [tokens, heads · dim]."""
        q, kv = self.q[sequence, start:stop].double(), self.kv[sequence, :stop].double()
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in kv.split(self.kv_heads, dim=1))
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.scoring.scale
        if self.scoring.softcap:
            scores = self.scoring.softcap * torch.tanh(scores / self.scoring.softcap)
        key, query = torch.arange(stop), torch.arange(start, stop)[:, None]
        hidden = (key > query) | (key <= query - (self.scoring.window or LENGTH))
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(2), v).flatten(1)


def _tables(n: int, block_size: int, seed: int = 0) -> tuple[np.ndarray, int]:
    width = -(-LENGTH // block_size)
    return np.random.default_rng(seed).permutation(n * width).reshape(n, width).astype(np.int32), n * width


@pytest.mark.parametrize("block_size", [8, 16, 40, 256])
@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 32), (8, 1, 64), (9, 3, 64)])
def test_it_is_a_causal_softmax_over_everything_cached(block_size: int, heads: tuple[int, int, int]) -> None:
    sequences = Sequences(2, *heads)
    tables, blocks = _tables(2, block_size)
    attention, _ = sequences.attention(block_size, blocks)
    for rows in ([(0, 0, 150), (1, 0, 1)], [(0, 150, 151), (1, 1, 2)], [(0, 151, 420), (1, 2, 9)], [(1, 9, 10), (0, 420, 421)]):
        expected = torch.cat([sequences.reference(*row) for row in rows])
        assert torch.allclose(sequences.step(attention, rows, tables).double(), expected, atol=2e-6)


@pytest.mark.parametrize("window", [0, 1, 5, 128, 200, 1000])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_layer_may_have_a_window_a_soft_cap_and_a_scale_of_its_own(window: int, softcap: float) -> None:
    sequences = Sequences(3, scoring=Scoring(0.4, window, softcap))
    tables, blocks = _tables(3, 16)
    attention, _ = sequences.attention(16, blocks)
    steps = ([(0, 0, 150), (1, 0, 1)], [(0, 150, 151), (1, 1, 2)], [(0, 151, 420), (1, 2, 4), (2, 0, 90)], [(1, 4, 9), (0, 420, 421)])
    for rows in (*steps, [(0, 421, 422), (1, 9, 10), (2, 90, 91)]):
        expected = torch.cat([sequences.reference(*row) for row in rows])
        assert torch.allclose(sequences.step(attention, rows, tables).double(), expected, atol=2e-6)


def test_layers_of_different_windows_take_turns() -> None:
    scorings = [Scoring(0.25, 7), Scoring(0.25), Scoring(0.5, 7, 3.0), Scoring(0.25, 130)]
    layers = [Sequences(2, scoring=scoring) for scoring in scorings]
    shape = CacheShape(4, 90, 2, 16, 16)
    attention = TorchAttention(new_cache(shape, CPU, torch.float32), shape, 6, scorings)
    tables, _ = _tables(2, 16)
    for spans in ([(0, 0, 5), (1, 0, 140)], [(0, 5, 6), (1, 140, 141)], [(0, 6, 9), (1, 141, 300)]):
        starts, stops = (np.array([span[i] for span in spans], np.int32) for i in (1, 2))
        attention.begin(Rows(starts, stops - starts, tables, np.zeros(2, bool)))
        for i, layer in enumerate(layers):
            q, kv = (torch.cat([x[s, start:stop] for s, start, stop in spans]) for x in (layer.q, layer.kv))
            expected = torch.cat([layer.reference(*span) for span in spans])
            assert torch.allclose(attention.attend(i, q, kv).double(), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("threads", "window"), [pytest.param(1, 0, marks=pytest.mark.slow), pytest.param(2, 0, marks=pytest.mark.slow), (2, 150)]
)
def test_neither_batch_nor_chunks_nor_blocks_change_a_bit(threads: int, window: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    sequences = Sequences(5, 9, 3, 64, Scoring(0.125, window))
    alone = []
    for s in range(5):
        tables, blocks = _tables(5, 16, seed=s)
        attention, _ = sequences.attention(16, blocks)
        alone.append(torch.cat([sequences.step(attention, [(s, i, i + 1)], tables) for i in range(LENGTH)]))
    random = np.random.default_rng(4)
    tables, blocks = _tables(5, 64)
    attention, _ = sequences.attention(64, blocks)
    at = [0] * 5
    while min(at) < LENGTH:
        rows = []
        for s in random.permutation([s for s in range(5) if at[s] < LENGTH])[: random.integers(1, 6)]:
            count = int(random.choice([1, 1, 2, 3, 5, 17, 64, 65, 130]))
            rows.append((int(s), at[s], min(at[s] + count, LENGTH)))
            at[s] = rows[-1][2]
        expected = torch.cat([alone[s][start:stop] for s, start, stop in rows])
        assert torch.equal(sequences.step(attention, rows, tables), expected)
    torch.set_num_threads(before)


def test_a_sequences_nan_stays_its_own() -> None:
    sequences = Sequences(3)
    sequences.kv[1] = float("nan")
    tables, blocks = _tables(3, 16)
    attention, _ = sequences.attention(16, blocks)
    for start, stop in ((0, 21), (21, 22)):
        out = sequences.step(attention, [(s, start, stop) for s in range(3)], tables).view(3, stop - start, -1)
        assert torch.isfinite(out[[0, 2]]).all()
        assert torch.isnan(out[1]).all()


def test_a_dead_row_writes_to_the_dummy_page_alone() -> None:
    sequences = Sequences(3)
    tables, blocks = _tables(3, 16)
    attention, cache = sequences.attention(16, blocks)
    sequences.step(attention, [(s, 0, 30) for s in range(3)], tables)
    before = cache.clone()
    out = sequences.step(attention, [(s, 30, 31) for s in range(3)], tables, dead=[1])
    assert torch.allclose(out[[0, 2]].double(), torch.cat([sequences.reference(s, 30, 31) for s in (0, 2)]), atol=2e-6)
    changed = (cache != before).flatten(2).any(dim=2)[0].nonzero().flatten().tolist()
    assert set(changed) == {int(tables[0, 1]), int(tables[2, 1]), blocks}


@pytest.mark.parametrize("heads", [(6, 2, 16), (8, 1, 64)])
def test_less_scratch_memory_gives_the_same_bits_and_a_long_row_keeps_none(
    heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = Sequences(2, *heads)
    tables, blocks = _tables(2, 16)
    steps = [[(0, 0, 300), (1, 0, 3)], [(0, 300, 400), (1, 3, 4)], [(0, 400, 650), (1, 4, 40)], [(0, 650, 651), (1, 40, 41)]]
    ample, _ = sequences.attention(16, blocks)
    told = [sequences.step(ample, rows, tables) for rows in steps]
    assert ample._units.most_queries(700) == 64
    for limit in (1 << 19, 1 << 17):  # units of 8 queries, of 1 that still takes more
        monkeypatch.setattr(units, "UNIT_BYTES", limit)
        monkeypatch.setattr(torch_backend, "UNIT_BYTES", limit)
        scant, _ = sequences.attention(16, blocks)
        for rows, expected in zip(steps, told, strict=True):
            assert torch.equal(sequences.step(scant, rows, tables), expected)
        assert scant._units.most_queries(768) < 64
        assert len(scant._scratch) == limit // 4


@pytest.mark.parametrize("heads", [(6, 2, 16), (8, 1, 64), (9, 3, 64)])
def test_no_step_needs_more_scratch_memory_than_is_told_beforehand(heads: tuple[int, int, int]) -> None:
    sequences = Sequences(2, *heads)
    tables, blocks = _tables(2, 16)
    attention, _ = sequences.attention(16, blocks)
    attention._scratch.fill_(torch.nan)
    for start, stop in ((0, 200), (200, 201), (201, 460), (460, 690), (690, 700)):
        sequences.step(attention, [(0, start, stop), (1, start, stop)], tables)
        used = int((~attention._scratch.isnan()).nonzero().max()) + 1
        assert used <= attention._units.scratch(stop)
    assert used > attention._units.scratch(stop) // 4, "the bound is of the same size"
