"""Chunks of sequences over cached prefixes, in pages of random order; what nobody wrote is NaN."""

from __future__ import annotations

import math

import torch

from tests.gpu_worker.cuda.reference import error

LENGTHS, COUNTS = [40, 1, 64, 200, 333, 513], [40, 1, 64, 37, 150, 385]  # the last `count` tokens of each are the chunk
KV_HEADS = 2


class PrefillCase:
    """cache [blocks, 2, KV_HEADS, page, dim], table, qkv, rows and tiles as prefill kernels take them; the last tile is for nothing."""

    def __init__(self, dim: int, repeat: int, page: int, tile_rows: int, dtype: torch.dtype, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(dim + repeat + page)
        self.dim, self.repeat, self.heads = dim, repeat, KV_HEADS * repeat
        self.firsts = [n - c for n, c in zip(LENGTHS, COUNTS, strict=True)]
        self.offsets = [sum(COUNTS[:i]) for i in range(len(COUNTS))]
        self.width = -(-max(LENGTHS) // page) + 1
        pages = len(LENGTHS) * self.width
        table = torch.randperm(pages, generator=generator, dtype=torch.int32).view(-1, self.width)
        cache = torch.full((pages, 2, KV_HEADS, page, dim), math.nan, dtype=dtype)
        self.kept = [torch.randn(2, KV_HEADS, n, dim, generator=generator).to(dtype) for n in LENGTHS]
        for row, kv in zip(table, self.kept, strict=True):
            for token in range(kv.shape[2]):
                cache[row[token // page], :, :, token % page] = kv[:, :, token]
        self.q = torch.randn(sum(COUNTS), (self.heads + 2 * KV_HEADS) * dim, generator=generator).to(dtype)
        rows = [[i, f, c, c, o, 0, 0, 0] for i, (f, c, o) in enumerate(zip(self.firsts, COUNTS, self.offsets, strict=True))]
        tiles = [[i, t] for i, c in enumerate(COUNTS) for t in range(0, c, tile_rows // repeat)] + [[-1, -1]]
        self.cache, self.table, self.qkv = cache.to(device), table.to(device), self.q.to(device)
        self.rows, self.tiles = (torch.tensor(x, dtype=torch.int32, device=device) for x in (rows, tiles))
        self.out = torch.full((sum(COUNTS), self.heads * dim), math.nan, dtype=dtype, device=device)
        self.scale = dim**-0.5 * math.log2(math.e)

    def error(self) -> float:
        """Of `out` against float64, of the chunk where it is largest."""
        errors = []
        for kv, first, count, offset in zip(self.kept, self.firsts, COUNTS, self.offsets, strict=True):
            q = self.q[offset : offset + count, : self.heads * self.dim].double().view(count, self.heads, self.dim)
            k, v = kv.double().repeat_interleave(self.repeat, 1)
            scores = torch.einsum("nhd,htd->hnt", q, k) * self.dim**-0.5
            hidden = torch.arange(kv.shape[2]) > torch.arange(first, first + count)[:, None]
            want = torch.einsum("hnt,htd->nhd", scores.masked_fill(hidden, -math.inf).softmax(2), v).flatten(1)
            errors.append(error(self.out[offset : offset + count].cpu(), want))
        return max(errors) if all(e == e for e in errors) else math.nan
