"""Paged attention in plain torch: the reference, and what the CPU runs.

A row's result has the same bits alone and in any batch, in one chunk and in many, with any blocks. Three things see to it:

* Keys are taken in tiles of 64, aligned to the sequence, whatever the block size; a tile's matrix products always have the
  same inner and outer widths, and a number of query rows that is a multiple of 4 (MKL treats 1, 2, 3 and 5 rows otherwise).
* The softmax takes two passes: the maximum over all tiles, which no order can change, then sums over tiles in their order,
  where tiles beyond the end add exact zeros.
* A padded entry reads the row's own first block, never a foreign one, so that nobody's NaN reaches anybody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.attention.interface import CacheShape, Rows

TILE = 64  # keys of a tile
_QUERIES = (1, 8, 64)  # queries of a unit; the last is also how a long prefill is cut
_UNIT_BYTES = 8 << 20  # of keys and values gathered at once: a few units stay in the cache

_Ints = npt.NDArray[np.int64]


@dataclass
class _Group:
    """Units (a row's queries, up to 64 of them) that are computed together: as many queries, as many tiles."""

    queries: int
    tiles: int
    tokens: torch.Tensor  # [units · queries] flat token of each query, the unit's last one repeated
    real: torch.Tensor  # [n] which of those are no repetition
    pages: torch.Tensor  # [units · tiles · kv_heads · parts] rows of the cache, keys; values stand `value_offset` further
    hidden: torch.Tensor  # [units, tiles, 1, M, TILE] bool: keys that a query does not see


class TorchAttention:
    """See the module. `cache` is interface.new_cache's, on any device."""

    name = "torch"

    def __init__(self, cache: torch.Tensor, shape: CacheShape, heads: int) -> None:
        self._shape = shape
        self._heads = heads
        self._per_kv = heads // shape.kv_heads
        self._part = math.gcd(shape.block_size, TILE)  # tokens of a cache row in the view below
        self._parts = shape.block_size // self._part
        self._device = cache.device
        self._gather_from = cache.view(shape.layers, -1, self._part * shape.head_dim)
        self._write_to = cache.view(shape.layers, -1, shape.head_dim)
        self._groups: list[_Group] = []
        self._keys = self._values = torch.empty(0, dtype=torch.int64)
        self._all_real = True

    # ------------------------------------------------------------ once a step

    def begin(self, rows: Rows) -> None:
        shape = self._shape
        counts = rows.counts.astype(np.int64)
        first_token = np.cumsum(counts) - counts
        row = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(row)) - first_token[row] + rows.starts[row]
        blocks = np.where(rows.dead[row], shape.dummy, rows.tables[row, positions // shape.block_size])
        heads = np.arange(shape.kv_heads)
        slots = (blocks[:, None] * (2 * shape.kv_heads) + heads) * shape.block_size + (positions % shape.block_size)[:, None]
        self._keys = self._index(slots)
        self._values = self._index(slots + shape.kv_heads * shape.block_size)
        self._all_real = not rows.dead.any()
        self._groups = self._plan(rows, first_token)

    def _plan(self, rows: Rows, first_token: _Ints) -> list[_Group]:
        """Cut the rows into units and gather those of one size."""
        by_size: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for i in np.flatnonzero(~rows.dead).tolist():
            start, left = int(rows.starts[i]), int(rows.counts[i])
            while left:
                n = min(left, _QUERIES[-1])
                size = next(q for q in _QUERIES if q >= n)
                by_size.setdefault((size, _round_up(-(-(start + n) // TILE))), []).append((i, start, n))
                start, left = start + n, left - n
        groups = []
        for (queries, tiles), units in sorted(by_size.items()):
            bytes_each = 8 * tiles * TILE * self._shape.kv_heads * self._shape.head_dim
            most = max(1, _UNIT_BYTES // bytes_each)
            for at in range(0, len(units), most):
                groups.append(self._group(rows, first_token, queries, tiles, np.array(units[at : at + most])))
        return groups

    def _group(self, rows: Rows, first_token: _Ints, queries: int, tiles: int, units: _Ints) -> _Group:
        row, start, n = units.T
        nth = np.arange(queries)
        # queries beyond a unit's own repeat its last one
        position = start[:, None] + np.minimum(nth, n[:, None] - 1)  # [units, queries]
        tokens = first_token[row][:, None] + position - rows.starts[row][:, None]
        by_row = np.repeat(position, self._per_kv, axis=1)  # query rows of one key/value head: queries × heads
        by_row = np.pad(by_row, ((0, 0), (0, -by_row.shape[1] % 4)), mode="edge")
        keys = np.arange(tiles * TILE).reshape(1, tiles, 1, 1, TILE)
        return _Group(
            queries=queries,
            tiles=tiles,
            tokens=self._index(tokens),
            real=self._index(np.flatnonzero(nth < n[:, None])),
            pages=self._index(self._pages(rows, row, start + n, tiles)),
            hidden=torch.from_numpy(keys > by_row[:, None, None, :, None]).to(self._device),
        )

    def _pages(self, rows: Rows, row: _Ints, end: _Ints, tiles: int) -> _Ints:
        """Cache rows of the keys of each unit: [units, tiles, kv_heads, parts of a tile]."""
        shape, per_tile = self._shape, TILE // self._part
        part = np.arange(tiles * per_tile)  # parts of the whole sequence, in order
        index = part // self._parts
        used = part * self._part < end[:, None]
        block = np.where(used, rows.tables[row[:, None], np.where(used, index, 0)], rows.tables[row, 0][:, None])
        block = block.reshape(len(row), tiles, 1, per_tile)
        head = np.arange(shape.kv_heads)[:, None]
        within = (part % self._parts).reshape(tiles, 1, per_tile)
        return (block * (2 * shape.kv_heads) + head) * self._parts + within

    def _index(self, values: _Ints) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64).reshape(-1)).to(self._device)

    # ------------------------------------------------------------ once a layer

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shape = self._shape
        write_to = self._write_to[layer]
        write_to.index_copy_(0, self._keys, k.reshape(-1, shape.head_dim).to(write_to.dtype))
        write_to.index_copy_(0, self._values, v.reshape(-1, shape.head_dim).to(write_to.dtype))
        new = q.new_empty if self._all_real else q.new_zeros
        out = new(q.shape[0], self._heads * shape.head_dim)
        q = q * shape.head_dim**-0.5
        for group in self._groups:
            out[group.tokens[group.real]] = self._attend(layer, q, group)[group.real].to(out.dtype)
        return out

    def _attend(self, layer: int, q: torch.Tensor, group: _Group) -> torch.Tensor:
        """Returns [units · queries, heads · head_dim]."""
        kv_heads, dim, per_kv = self._shape.kv_heads, self._shape.head_dim, self._per_kv
        units, tiles, _, m, _ = group.hidden.shape
        gather_from = self._gather_from[layer]
        keys = gather_from.index_select(0, group.pages).view(-1, TILE, dim)
        values = gather_from.index_select(0, group.pages + kv_heads * self._parts).view(-1, TILE, dim)
        asked = q.index_select(0, group.tokens).view(units, group.queries, kv_heads, per_kv, dim).transpose(1, 2)
        asked = asked.reshape(units, 1, kv_heads, group.queries * per_kv, dim)
        if m > asked.shape[3]:
            asked = torch.nn.functional.pad(asked, (0, 0, 0, m - asked.shape[3]))
        asked = asked.expand(units, tiles, kv_heads, m, dim).reshape(-1, m, dim).to(keys.dtype)
        scores = torch.bmm(asked, keys.transpose(1, 2)).view(units, tiles, kv_heads, m, TILE)
        scores.masked_fill_(group.hidden, -torch.inf)
        scores.sub_(scores.amax(dim=4, keepdim=True).amax(dim=1, keepdim=True)).exp_()
        total = scores.sum(dim=4).sum(dim=1)  # [units, kv_heads, m]
        mixed = torch.bmm(scores.view(-1, m, TILE), values).view(units, tiles, kv_heads, m, dim).sum(dim=1)
        mixed.div_(total.unsqueeze(-1))
        mixed = mixed[:, :, : group.queries * per_kv].reshape(units, kv_heads, group.queries, per_kv * dim)
        return mixed.transpose(1, 2).reshape(units * group.queries, kv_heads * per_kv * dim)


def _round_up(tiles: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, …: units of like length are computed together."""
    if tiles <= 4:
        return tiles
    power: int = 1 << (tiles - 1).bit_length()
    return power * 3 // 4 if tiles <= power * 3 // 4 else power
