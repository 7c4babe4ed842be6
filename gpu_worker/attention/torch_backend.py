"""Paged attention in plain torch: the reference, and what the CPU runs.

A row's result has the same bits alone and in any batch, in one chunk and in many, with blocks of any size. What sees to it:

* The number of query rows of a matrix product is a multiple of 4: MKL treats 1, 2, 3 and 5 rows otherwise than the rest.
* Probabilities and values are multiplied in tiles of 128 keys, aligned to the sequence, which MKL sums in one go (from 193
  keys on it cuts them in ways that depend on their number); the tiles' results are added in order.
* Keys beyond a row's end have probability 0, exactly, and change no sum. They are read from the row's own first block, never
  from a foreign one, so that nobody's NaN reaches anybody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.attention.interface import CacheShape, Rows, cache_rows

TILE = 128  # keys of a tile
_PART = 32  # keys that are gathered at once, at most; divides every number of keys in `_round_up`
_QUERIES = (1, 8, 64)  # queries of a unit; the last is also how a long prefill is cut
_GROUP_BYTES = 8 << 20  # of keys, values and scores at once: they stay in the processor's cache

_Ints = npt.NDArray[np.int64]


@dataclass
class _Group:
    """Units (a row's queries, up to 64 of them) that are computed together: as many queries, as many keys.

    M is the number of query rows of one key/value head: queries × heads that share it, padded to a multiple of 4.
    """

    units: int
    keys: int
    everything: bool  # the group is the whole step: one query each, in the step's order
    tokens: torch.Tensor  # [units · queries] flat token of each query, the unit's last one repeated
    real: torch.Tensor  # [n] which of those are no repetition
    pages: torch.Tensor  # [2 · units · kv_heads · parts] rows of the cache: keys, then values
    hidden: torch.Tensor  # [units, 1, M, keys] bool: what a query does not see
    padded: torch.Tensor  # [units, kv_heads, M, head_dim] zeros, to be filled with scaled queries
    asked: torch.Tensor  # [units, queries, kv_heads, heads per kv_head, head_dim]: the part of `padded` to fill


class TorchAttention:
    """See the module. `cache` is interface.new_cache's, on any device."""

    name = "torch"

    def __init__(self, cache: torch.Tensor, shape: CacheShape, heads: int) -> None:
        self._shape = shape
        self._heads = heads
        self._per_kv = heads // shape.kv_heads
        self._part = math.gcd(shape.block_size, _PART)  # tokens of a cache row in the view below
        self._parts = shape.block_size // self._part
        self._dtype = cache.dtype
        self._device = cache.device
        self._scale = shape.head_dim**-0.5
        self._gather_from = cache.view(shape.layers, -1, self._part * shape.head_dim)
        self._write_to = cache.view(shape.layers, -1, shape.head_dim)
        self._written = torch.empty(0, dtype=torch.int64)  # cache rows of each token's keys and values, token by token
        self._groups: list[_Group] = []
        self._all_real = True

    # ------------------------------------------------------------ once a step

    def begin(self, rows: Rows) -> None:
        counts = rows.counts.astype(np.int64)
        self._written = self._index(cache_rows(self._shape, rows))
        self._all_real = not rows.dead.any()
        self._groups = self._plan(rows, np.cumsum(counts) - counts)

    def _plan(self, rows: Rows, first_token: _Ints) -> list[_Group]:
        """Cut the rows into units and put those of one size together."""
        by_size: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for i in np.flatnonzero(~rows.dead).tolist():
            start, left = int(rows.starts[i]), int(rows.counts[i])
            while left:
                n = min(left, _QUERIES[-1])
                size = next(q for q in _QUERIES if q >= n)
                by_size.setdefault((size, _round_up(start + n)), []).append((i, start, n))
                start, left = start + n, left - n
        groups = []
        for (queries, keys), units in sorted(by_size.items()):
            per_key = 2 * self._shape.head_dim + self._rows(queries)
            most = max(1, _GROUP_BYTES // (4 * keys * self._shape.kv_heads * per_key))
            for at in range(0, len(units), most):
                groups.append(self._group(rows, first_token, queries, keys, np.array(units[at : at + most])))
        return groups

    def _rows(self, queries: int) -> int:
        """Query rows of one key/value head, M."""
        return -(-queries * self._per_kv // 4) * 4

    def _group(self, rows: Rows, first_token: _Ints, queries: int, keys: int, units: _Ints) -> _Group:
        shape = self._shape
        row, start, n = units.T
        nth = np.arange(queries)
        # queries beyond a unit's own repeat its last one
        position = start[:, None] + np.minimum(nth, n[:, None] - 1)  # [units, queries]
        tokens = first_token[row][:, None] + position - rows.starts[row][:, None]
        m = self._rows(queries)
        by_row = np.repeat(position, self._per_kv, axis=1) if queries > 1 else position
        if queries > 1:
            by_row = np.pad(by_row, ((0, 0), (0, m - by_row.shape[1])), mode="edge")
        padded = torch.zeros(len(row), shape.kv_heads, m, shape.head_dim, dtype=self._dtype, device=self._device)
        asked = padded[:, :, : queries * self._per_kv].view(len(row), shape.kv_heads, queries, self._per_kv, -1).transpose(1, 2)
        return _Group(
            units=len(row),
            keys=keys,
            everything=queries == 1 and np.array_equal(tokens[:, 0], np.arange(int(rows.counts.sum()))),
            tokens=self._index(tokens),
            real=self._index(np.flatnonzero(nth < n[:, None])),
            pages=self._index(self._pages(rows, row, start + n, keys)),
            hidden=torch.from_numpy(np.arange(keys) > by_row[:, None, :, None]).to(self._device),
            padded=padded,
            asked=asked,
        )

    def _pages(self, rows: Rows, row: _Ints, end: _Ints, keys: int) -> _Ints:
        """Cache rows of each unit's keys and values: [2, units, kv_heads, parts]."""
        kv_heads = self._shape.kv_heads
        part = np.arange(keys // self._part)
        index = np.where(part * self._part < end[:, None], part // self._parts, 0)  # [units, parts]
        block = rows.tables[row[:, None], index].astype(np.int64)
        head = np.arange(2 * kv_heads).reshape(2, 1, kv_heads, 1)
        return (block[:, None] * (2 * kv_heads) + head) * self._parts + part % self._parts

    def _index(self, values: _Ints) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64).reshape(-1)).to(self._device)

    # ------------------------------------------------------------ once a layer

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        self._write_to[layer].index_copy_(0, self._written, kv.reshape(-1, self._shape.head_dim).to(self._dtype))
        if len(self._groups) == 1 and self._groups[0].everything:
            return self._attend(layer, q, self._groups[0]).to(q.dtype)
        new = q.new_empty if self._all_real else q.new_zeros
        out = new(q.shape[0], self._heads * self._shape.head_dim)
        for group in self._groups:
            mixed = self._attend(layer, q.index_select(0, group.tokens), group)
            out[group.tokens[group.real]] = mixed[group.real].to(out.dtype)
        return out

    def _attend(self, layer: int, q: torch.Tensor, group: _Group) -> torch.Tensor:
        """q: [units · queries, heads, head_dim]. Returns [units · queries, heads · head_dim]."""
        kv_heads, dim = self._shape.kv_heads, self._shape.head_dim
        units, keys = group.units, group.keys
        m = group.padded.shape[2]
        cached = self._gather_from[layer].index_select(0, group.pages).view(2, units * kv_heads, keys, dim)
        torch.mul(q.reshape(group.asked.shape), self._scale, out=group.asked)
        scores = torch.bmm(group.padded.view(-1, m, dim), cached[0].transpose(1, 2))
        scores.view(units, kv_heads, m, keys).masked_fill_(group.hidden, -torch.inf)
        weights = torch.softmax(scores, dim=2)
        if keys <= TILE:
            mixed = torch.bmm(weights, cached[1])
        else:
            tiles = keys // TILE
            weights = weights.view(-1, m, tiles, TILE).transpose(1, 2).reshape(-1, m, TILE)
            mixed = torch.bmm(weights, cached[1].view(-1, TILE, dim)).view(-1, tiles, m, dim).sum(dim=1)
        queries = group.asked.shape[1]
        mixed = mixed.view(units, kv_heads, m, dim)[:, :, : queries * self._per_kv]
        mixed = mixed.view(units, kv_heads, queries, self._per_kv, dim).transpose(1, 2)
        return mixed.reshape(units * queries, self._heads * dim)


def _round_up(keys: int) -> int:
    """64, 96, then 1, 2, 3, 4, 6, 8, 12, 16, 24, … tiles: units of like length are computed together."""
    if keys <= TILE * 3 // 4:
        return TILE // 2 if keys <= TILE // 2 else TILE * 3 // 4
    tiles = -(-keys // TILE)
    if tiles > 4:
        power: int = 1 << (tiles - 1).bit_length()
        tiles = power * 3 // 4 if tiles <= power * 3 // 4 else power
    return tiles * TILE
