"""The flash_attn backend over a stand-in of the package with its semantics, on the CPU; what forbids it."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from gpu_worker.attention.backends import check_backend, make_backend
from gpu_worker.attention.interface import CacheShape, new_cache
from gpu_worker.attention.scoring import Scoring
from gpu_worker.errors import LoadError
from tests.gpu_worker.test_attention_torch import CPU, Sequences, _tables

PAGE = 256


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int,
    pages: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float,
    window_size: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    """One row, causal from the bottom right: q [n, heads, dim], keys and values [pages, page, kv_heads, dim]."""
    n, heads, _ = q.shape
    k, v = (x[pages.long()].flatten(0, 1)[:length].double() for x in (keys, values))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    assert causal
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * softmax_scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    behind = torch.arange(length - n, length)[:, None] - torch.arange(length)  # how far a key lies before a query
    hidden = (behind < 0) | (behind > (window_size[0] if window_size[0] >= 0 else length))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(2), v).nan_to_num().to(q.dtype)


class Package(ModuleType):
    """Checks what the package checks, computes what it computes."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls: list[str] = []

    def _check(self, keys: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor) -> None:
        assert keys.stride(-1) == 1
        assert keys.shape[1] % 256 == 0
        assert tables.dtype == lengths.dtype == torch.int32
        assert tables.is_contiguous()
        assert 0 <= int(tables.min()) <= int(tables.max()) < len(keys)
        assert int(lengths.max()) <= tables.shape[1] * keys.shape[1]

    def flash_attn_with_kvcache(self, q, keys, values, *, cache_seqlens, block_table, **options):  # type: ignore[no-untyped-def]
        self._check(keys, block_table, cache_seqlens)
        assert q.shape[1] == 1
        self.calls.append("with_kvcache")
        rows = zip(q[:, None], cache_seqlens, block_table)
        return torch.stack([attend(*row, keys, values, n, pages, **options) for row, n, pages in rows])

    def flash_attn_varlen_func(self, q, keys, values, starts, key_starts, most_q, most_k, *, block_table, **options):  # type: ignore[no-untyped-def]
        lengths = key_starts.diff()
        self._check(keys, block_table, lengths)
        assert (most_q, most_k) == (int(starts.diff().max()), int(lengths.max()))
        assert int(starts[-1]) == len(q)
        self.calls.append("varlen")
        rows = zip(q.split(starts.diff().tolist()), lengths.tolist(), block_table, strict=True)
        return torch.cat([attend(row, keys, values, n, pages, **options) for row, n, pages in rows])


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    made = Package()
    monkeypatch.setitem(sys.modules, "flash_attn", made)
    return made


@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 32), (9, 3, 64)])
@pytest.mark.parametrize("scoring", [None, Scoring(0.3, 50), Scoring(0.3, 50, 2.0)])
def test_it_is_a_causal_softmax_in_decode_prefill_and_mixed_steps(
    package: Package, heads: tuple[int, int, int], scoring: Scoring | None
) -> None:
    sequences = Sequences(3, *heads, scoring)
    tables, blocks = _tables(3, PAGE)
    shape = CacheShape(1, blocks, sequences.kv_heads, PAGE, sequences.dim)
    cache = new_cache(shape, CPU, torch.float32)
    cache[:, : shape.dummy] = float("nan")  # a page's unwritten part is not read
    attention = make_backend("flash_attn", cache, shape, sequences.heads, [sequences.scoring])
    steps = (
        [(0, 0, 300), (1, 0, 2)],
        [(0, 300, 301), (2, 0, 40), (1, 2, 3)],
        [(0, 301, 302), (2, 40, 41), (1, 3, 4)],
        [(1, 4, 500)],
    )
    for rows in steps:
        expected = torch.cat([sequences.reference(*row) for row in rows])
        assert torch.allclose(sequences.step(attention, rows, tables).double(), expected, atol=2e-6)
    assert package.calls == ["varlen", "with_kvcache", "varlen", "with_kvcache", "varlen"]


def test_a_dead_row_writes_to_the_dummy_page_alone(package: Package) -> None:
    sequences = Sequences(3)
    tables, blocks = _tables(3, PAGE)
    shape = CacheShape(1, blocks, sequences.kv_heads, PAGE, sequences.dim)
    cache = new_cache(shape, CPU, torch.float32)
    attention = make_backend("flash_attn", cache, shape, sequences.heads)
    sequences.step(attention, [(s, 0, 30) for s in range(3)], tables)
    before = cache.clone()
    out = sequences.step(attention, [(s, 30, 31) for s in range(3)], tables, dead=[1])
    assert torch.allclose(out[[0, 2]].double(), torch.cat([sequences.reference(s, 30, 31) for s in (0, 2)]), atol=2e-6)
    changed = (cache != before).flatten(2).any(dim=2)[0].nonzero().flatten().tolist()
    assert set(changed) == {int(tables[0, 0]), int(tables[2, 0]), blocks}
    assert np.isfinite(out.numpy()).all()


CARD = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "block_size", "head_dim", "words"),
    [
        (CPU, torch.bfloat16, 256, 128, "needs an NVIDIA card"),
        (CARD, torch.float32, 256, 128, "not in float32: see --dtype"),
        (CARD, torch.bfloat16, 16, 128, "not 16: --block-size 256"),
        (CARD, torch.float16, 512, 320, "not 320"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(
    package: Package, device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int, words: str
) -> None:
    with pytest.raises(LoadError, match=words) as refused:
        check_backend("flash_attn", device, dtype, block_size, head_dim)
    assert "\n" not in str(refused.value)
    check_backend("torch", device, dtype, block_size, head_dim)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(LoadError, match=r"pagewire\[flash\]"):
        check_backend("flash_attn", CARD, torch.bfloat16, 256, 128)
