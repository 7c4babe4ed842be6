"""The attention kernels' options against float64: windows, capped scores, head dimensions, splits, pages.

Where there is no card but Triton is installed, its interpreter runs them; TRITON_INTERPRET must then be set before the import.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch

CARD = torch.cuda.is_available()
if not CARD:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from benchmarks.gpu_attention import work_list  # noqa: E402
from gpu_worker.cuda.kernels.decode_attention import decode_attention  # noqa: E402
from gpu_worker.cuda.kernels.prefill_attention import prefill_attention  # noqa: E402
from protocol.columns import Int32  # noqa: E402
from tests.gpu_worker.cuda.reference import error  # noqa: E402

DEVICE = "cuda" if CARD else "cpu"
PAGE, KV_HEADS, EPS = 16, 2, 1e-6
SETTINGS = [  # head dimension, query heads per KV head, window, cap, units of keys and values in an fp8 cache
    (64, 2, 0, 0.0, None),
    (96, 3, 0, 0.0, None),
    (256, 1, 0, 0.0, None),
    (64, 4, 70, 0.0, None),
    (32, 2, 1, 0.0, None),
    (64, 2, 0, 20.0, None),
    (96, 1, 100, 30.0, None),
    (64, 2, 0, 0.0, (1.0, 1.0)),
    (96, 3, 70, 0.0, (0.25, 3.0)),
    (64, 1, 0, 20.0, (0.5, 0.125)),
]
Scales = tuple[float, float] | None


class Case:
    """Sequences of random keys and values in pages of random order; what nobody may read is NaN. fp32 throughout."""

    def __init__(
        self, lengths: list[int], dim: int, repeat: int, window: int, cap: float, scales: Scales, common: list[int] | None = None
    ) -> None:
        """common: blocks that each sequence shares with the one before it."""
        self.lengths, self.dim, self.repeat, self.window, self.cap = lengths, dim, repeat, window, cap
        self.scales = scales
        self.heads, self.random = KV_HEADS * repeat, torch.Generator().manual_seed(dim + window)
        self.width = max(lengths) // PAGE + 1
        pages = len(lengths) * self.width
        order = torch.randperm(pages, generator=self.random).view(len(lengths), self.width)
        kept = [self.kept(self.randn(2, KV_HEADS, n, dim)) for n in lengths]
        for row, shared in enumerate(common or [], 1):
            order[row, :shared] = order[row - 1, :shared]
            kept[row][:, :, : shared * PAGE] = kept[row - 1][:, :, : shared * PAGE]
        self.table = order.int().to(DEVICE)
        self.kv = [self.seen(kv) for kv in kept]
        cache = torch.full((pages, 2, KV_HEADS, PAGE, dim), math.nan)
        for n, kv, row in zip(lengths, kept, order, strict=True):
            for token in range(n):
                cache[row[token // PAGE], :, :, token % PAGE] = kv[:, :, token]
        self.cache = (cache if scales is None else cache.to(torch.float8_e4m3fn)).to(DEVICE)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def kept(self, kv: torch.Tensor) -> torch.Tensor:
        """What the cache holds of keys and values [2, …]."""
        if self.scales is None:
            return kv
        return torch.stack([(x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() for x, s in zip(kv, self.scales, strict=True)])

    def seen(self, kept: torch.Tensor) -> torch.Tensor:
        """And what that stands for."""
        return kept if self.scales is None else torch.stack([x * s for x, s in zip(kept, self.scales, strict=True)])

    def forget(self, seen_from: list[int]) -> None:
        """Poison the tokens before these, a number a row, but not those that another row sees."""
        cache = self.cache if self.scales is None else self.cache.view(torch.uint8)
        seen = torch.zeros(len(cache), PAGE, dtype=torch.bool)
        for row, (first, n) in enumerate(zip(seen_from, self.lengths, strict=True)):
            for token in range(first, n):
                seen[self.table[row, token // PAGE], token % PAGE] = True
        cache.transpose(1, 3)[~seen.to(DEVICE)] = math.nan if self.scales is None else 0x7F

    def want(self, q: torch.Tensor, first: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """float64: q [n, heads, dim] at positions from `first` on; keys and values [kv_heads, tokens, dim]."""
        k, v = (x.double().repeat_interleave(self.repeat, 0) for x in (keys, values))
        scores = torch.einsum("nhd,htd->hnt", q.double(), k) * self.dim**-0.5
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        position, key = torch.arange(first, first + len(q))[:, None], torch.arange(k.shape[1])
        hidden = (key > position) | (key <= position - self.window if self.window else False)
        return torch.einsum("hnt,htd->nhd", scores.masked_fill(hidden, -math.inf).softmax(2), v).flatten(1)

    def constants(self) -> dict[str, Any]:
        padded = 1 << (self.dim - 1).bit_length()
        sizes = {"WIDTH": self.width, "KV_HEADS": KV_HEADS, "R": self.repeat, "RP": 1 << (self.repeat - 1).bit_length()}
        scales = None if self.scales is None else torch.tensor(self.scales, device=DEVICE)
        return sizes | {"D": self.dim, "DP": padded, "PAGE": PAGE, "WINDOW": self.window, "SOFTCAP": self.cap, "kv_scales": scales}


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "repeat", "window", "cap", "scales"), SETTINGS)
def test_decode_attention(dim: int, repeat: int, window: int, cap: float, scales: Scales) -> None:
    lengths = [0, 5, 64, 150, 331]  # cached tokens; the new one comes on top
    case = Case(lengths, dim, repeat, window, cap, scales)
    check_decode(case, work_list(lengths, 1, 33))


def check_decode(case: Case, work: Int32, packed: int = 0) -> None:
    """A step of the case's sequences by the items `work` against float64, and what it leaves in the cache."""
    lengths, dim, window, scales = case.lengths, case.dim, case.window, case.scales
    qkv = case.randn(len(lengths), case.heads + 2 * KV_HEADS, dim) * 3
    qkv[1, case.heads + KV_HEADS :] *= 1000 if scales else 1  # more than fp8 holds
    norms = [case.randn(dim).abs() for _ in range(2)]
    angles = case.randn(max(lengths) + 1, dim // 2)
    items = torch.cat((torch.from_numpy(work).to(DEVICE), torch.tensor([[-1, 0, 0, 1, 0, 0, 0, 0]], dtype=torch.int32, device=DEVICE)))
    case.forget([max(0, n + 1 - window) if window else 0 for n in lengths])
    out = torch.full((len(lengths), case.heads * dim), math.nan, device=DEVICE)
    padded = case.constants()["RP"]
    partials = int((work[:, 5] + work[:, 3])[work[:, 3] > 0].max())
    partial = torch.full((partials, KV_HEADS, padded, dim), math.nan, device=DEVICE)
    partial_ml = torch.full((partials, KV_HEADS, 2, padded), math.nan, device=DEVICE)
    arrivals = torch.zeros(len(lengths), KV_HEADS, dtype=torch.int32, device=DEVICE)
    inputs = [x.contiguous().to(DEVICE) for x in (qkv, *norms, angles.cos(), angles.sin())]
    decode_attention[(KV_HEADS, len(items))](
        inputs[0], case.cache, case.table, items, out, partial, partial_ml, arrivals, *inputs[1:], dim**-0.5 * math.log2(math.e), EPS,
        **case.constants(), TILE=64, STAGES=2, QK_NORM=1, PDL=0, PACKED=packed, num_warps=4,
    )  # fmt: skip

    def turned(x: torch.Tensor, norm: torch.Tensor, position: int) -> torch.Tensor:
        x = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS) * norm
        a, b = x.chunk(2, -1)
        c, s = angles[position].double().cos(), angles[position].double().sin()
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    wanted = []
    for row, n in enumerate(lengths):
        q, k, v = qkv[row].split((case.heads, KV_HEADS, KV_HEADS))
        at = case.cache[case.table[row, n // PAGE], :, :, n % PAGE].cpu()
        kept = case.kept(torch.stack((turned(k, norms[1], n), v.double()))).double()
        # Triton 3.6's interpreter forgets the carry where fp8 rounds up to a power of two
        whole = torch.frexp(kept).mantissa.abs() != 0.5 if scales and not CARD else torch.ones_like(kept, dtype=torch.bool)
        assert error(at.double()[whole], kept[whole]) < (1e-6 if scales is None else 0.01)  # the last bit decides a tie
        new = case.seen(at.double())
        keys, values = torch.cat((case.kv[row].double(), new[:, :, None]), 2)
        wanted.append(case.want(turned(q, norms[0], n)[None], n, keys, values))
    assert error(out.cpu(), torch.cat(wanted)) < 2e-6
    assert not arrivals.any()


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "repeat", "window", "cap", "scales"), SETTINGS)
def test_prefill_attention_over_a_cached_prefix(dim: int, repeat: int, window: int, cap: float, scales: Scales) -> None:
    lengths, counts = [40, 1, 200, 333], [40, 1, 37, 150]  # the last `count` tokens of each are the chunk
    case = Case(lengths, dim, repeat, window, cap, scales)
    firsts = [n - c for n, c in zip(lengths, counts, strict=True)]
    case.forget([max(0, first + 1 - window) if window else 0 for first in firsts])
    qkv = case.randn(sum(counts), case.heads + 2 * KV_HEADS, dim)
    offsets = np.cumsum([0, *counts])
    rows = [[i, f, c, c, o, 0, 0, 0] for i, (f, c, o) in enumerate(zip(firsts, counts, offsets[:-1].tolist(), strict=True))]
    tile_rows = 32
    tokens = tile_rows // case.constants()["RP"]
    tiles = [[i, t] for i, c in enumerate(counts) for t in range(0, c, int(tokens))] + [[-1, -1]]  # as `prepare` leaves it
    out = torch.full((sum(counts), case.heads * dim), math.nan, device=DEVICE)
    prefill_attention[(KV_HEADS, len(tiles))](
        qkv.to(DEVICE), case.cache, case.table, *(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (tiles, rows)), out,
        dim**-0.5 * math.log2(math.e), **case.constants(), ROWS=tile_rows, TILE=32, STAGES=2, num_warps=4,
    )  # fmt: skip
    wanted = []
    for row, (first, count, offset) in enumerate(zip(firsts, counts, offsets[:-1].tolist(), strict=True)):
        keys, values = case.kv[row]
        wanted.append(case.want(qkv[offset : offset + count, : case.heads], first, keys, values))
    assert error(out.cpu(), torch.cat(wanted)) < 2e-6
