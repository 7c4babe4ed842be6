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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.attention.interface import CacheShape, Rows, cache_rows
from gpu_worker.attention.scoring import Scoring, plain
from gpu_worker.attention.stores import Fp8Cache, new_store
from gpu_worker.attention.units import QUERIES, TILE, UNIT_BYTES, Units, round_up

_PART = 32  # keys that are gathered at once, at most; divides every number of keys in `round_up`
_SMALL = 1 << 18  # elements of scratch memory up to which one thread is faster than several

_Ints = npt.NDArray[np.int64]


@dataclass
class _Group:
    """Units (a row's queries, up to 64 of them) that are computed together: as many queries, as many keys.

    M is the number of query rows of one key/value head: queries × heads that share it, padded to a multiple of 4.
    Batch is units · kv_heads. What a layer computes lies in scratch memory, and every view of it that a layer
    needs is made here once: making one takes as long as a small operation.
    """

    everything: bool  # the group is the whole step: one query each, in the step's order
    tokens: torch.Tensor  # [units · queries] flat token of each query, the unit's last one repeated
    real: torch.Tensor  # [n] which of those are no repetition
    pages: torch.Tensor  # [2 · batch · parts] rows of the cache: keys, then values
    asked: torch.Tensor  # [units, queries, kv_heads, heads per kv_head, head_dim], one query left out: the part of `queries` to fill
    queries: torch.Tensor  # [batch, M, head_dim] zeros, to be filled with scaled queries
    gathered: torch.Tensor  # [2 · batch · parts, part · head_dim], where `pages` are copied to
    keys: torch.Tensor  # [batch, head_dim, keys]: the first half of that
    values: torch.Tensor  # [batch, keys, head_dim], or in tiles [batch · tiles, TILE, head_dim]: the second half
    scores: torch.Tensor  # [batch, M, keys]
    veiled: torch.Tensor  # [units, kv_heads, M, late keys]: the part of `scores` that holds keys which some query does not see
    veil: torch.Tensor  # [units, 1, M or 1, late keys]: −∞ for a key that a query does not see, else 0
    weights: torch.Tensor  # [batch, M, keys]
    by_tile: torch.Tensor  # [batch, tiles, M, TILE]: the same
    tiles: torch.Tensor  # [batch, tiles, M, TILE], where `by_tile` is copied to: `scores`, whose time is over
    mixed_tiles: torch.Tensor  # [batch · tiles, M, head_dim]: `weights`, whose time is over
    mixed: torch.Tensor  # [batch, M, head_dim]
    answers: torch.Tensor  # the part of `mixed` that was asked for, of `asked`'s shape
    out: torch.Tensor  # [units · queries, heads · head_dim], where answers are copied to, for one layer after another
    out_by_head: torch.Tensor  # the same, of `asked`'s shape


class TorchAttention:
    """See the module. `cache` is interface.new_cache's, on any device."""

    name = "torch"

    def __init__(
        self,
        cache: torch.Tensor,
        shape: CacheShape,
        heads: int,
        scoring: Sequence[Scoring] | None = None,
        fp8: Fp8Cache | None = None,
    ) -> None:
        """scoring: of each layer; by default all keys by 1 / √head_dim. fp8: what the bytes of an fp8 cache mean."""
        self._shape = shape
        self._scoring = scoring or plain(shape.layers, shape.head_dim)
        self._heads = heads
        self._threads = self._used_threads = 1
        self._units = Units(heads, shape.kv_heads, shape.head_dim)
        self._part = math.gcd(shape.block_size, _PART)  # tokens of a cache row in the view below
        self._parts = shape.block_size // self._part
        self._store = new_store(cache, shape, self._part, fp8)
        self._dtype = self._store.dtype
        self._device = cache.device
        # Pages that no unit has used take no memory; one that needs more, of a very long row, gets it for its step.
        self._scratch = torch.empty(UNIT_BYTES // 4, dtype=self._dtype, device=self._device)
        self._written = torch.empty(0, dtype=torch.int64)  # cache rows of each token's keys and values, token by token
        self._groups: dict[int, list[_Group]] = {}  # of each window
        self._all_real = True
        self._q: torch.Tensor | None = None
        self._asking = self._scratch  # `_q` in the shape of the only group's `asked`

    # ------------------------------------------------------------ once a step

    def begin(self, rows: Rows) -> None:
        counts = rows.counts.astype(np.int64)
        self._written = self._index(cache_rows(self._shape, rows))
        self._all_real = not rows.dead.any()
        self._q = None
        self._threads = torch.get_num_threads()
        self._groups = self._plan(rows, np.cumsum(counts) - counts)

    def _plan(self, rows: Rows, first_token: _Ints) -> dict[int, list[_Group]]:
        longest = int((rows.starts + rows.counts).max(initial=0))
        cuts = {window: self._cut(rows, window) for window in {self._felt(s.window, longest) for s in self._scoring}}
        needed = max((self._units.elements(len(units), *size) for cut in cuts.values() for *size, units in cut), default=0)
        self._used_threads = 1 if needed <= _SMALL else self._threads
        enough = needed <= len(self._scratch)
        scratch = self._scratch if enough else torch.empty(needed, dtype=self._dtype, device=self._device)
        groups = {window: [self._group(rows, first_token, scratch, window, *cut) for cut in cut] for window, cut in cuts.items()}
        return {s.window: groups[self._felt(s.window, longest)] for s in self._scoring}

    @staticmethod
    def _felt(window: int, longest: int) -> int:
        """The window, or 0 if no row of the step is longer."""
        return window if longest > window else 0

    def _cut(self, rows: Rows, window: int) -> list[tuple[int, int, _Ints]]:
        """Cut the rows into units and put those of one size together: queries, keys, units (row, start, queries, first key)."""
        by_size: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
        for i in np.flatnonzero(~rows.dead).tolist():
            start, left = int(rows.starts[i]), int(rows.counts[i])
            while left:
                first = max(0, start - window + 1) // TILE * TILE if window else 0
                most = self._units.most_queries(round_up(start + min(left, QUERIES[-1]) - first)) if left > 1 else 1
                n = min(left, most)
                size = next(q for q in QUERIES if q >= n)
                by_size.setdefault((size, round_up(start + n - first)), []).append((i, start, n, first))
                start, left = start + n, left - n
        cut = []
        for (queries, keys), units in sorted(by_size.items()):
            most = self._units.together(queries, keys)
            cut += [(queries, keys, np.array(units[at : at + most])) for at in range(0, len(units), most)]
        return cut

    def _group(self, rows: Rows, first_token: _Ints, scratch: torch.Tensor, window: int, queries: int, keys: int, units: _Ints) -> _Group:
        row, start, n, first = units.T
        nth = np.arange(queries)
        # queries beyond a unit's own repeat its last one
        position = start[:, None] + np.minimum(nth, n[:, None] - 1)  # [units, queries]
        tokens = first_token[row][:, None] + position - rows.starts[row][:, None]
        kv_heads, dim, m = self._shape.kv_heads, self._shape.head_dim, self._units.rows(queries)
        batch, tiles = len(row) * kv_heads, -(-keys // TILE)
        padded = torch.zeros(batch, m, dim, dtype=self._dtype, device=self._device)
        sizes = self._units.sizes(len(row), queries, keys)
        gathered, scores, weights, mixed = torch.split_with_sizes(scratch[: sum(sizes)], sizes)
        weights, mixed_tiles = weights[: len(scores)], weights[: batch * tiles * m * dim]
        keys_gathered, values_gathered = gathered.view(2, batch, keys, dim)
        late = 0 if window else int(start.min()) + 1  # keys before this one are seen by all
        key = first[:, None, None, None] + np.arange(late, keys)
        at = self._by_query_row(position, m)[:, None, :, None]
        veil = np.where((key > at) | (key <= at - window if window else False), np.float32(-np.inf), np.float32(0))

        def by_query(x: torch.Tensor) -> torch.Tensor:
            """[units, queries, kv_heads, heads per kv_head, dim] of [batch, M, dim]; one query has no dimension of its own."""
            asked = x.view(len(row), kv_heads, m, dim)[:, :, : queries * self._units.per_kv]
            return asked if queries == 1 else asked.view(len(row), kv_heads, queries, self._units.per_kv, dim).transpose(1, 2)

        asked = by_query(padded)
        out = torch.empty(tokens.size, self._heads * dim, dtype=self._dtype, device=self._device)
        return _Group(
            everything=queries == 1 and np.array_equal(tokens[:, 0], np.arange(int(rows.counts.sum()))),
            tokens=self._index(tokens),
            real=self._index(np.flatnonzero(nth < n[:, None])),
            pages=self._index(self._pages(rows, row, start + n, first, keys)),
            asked=asked,
            queries=padded,
            gathered=gathered.view(-1, self._part * dim),
            keys=keys_gathered.transpose(1, 2),
            values=values_gathered if tiles == 1 else values_gathered.view(-1, TILE, dim),
            scores=scores.view(batch, m, keys),
            veiled=scores.view(len(row), kv_heads, m, keys)[..., late:],
            veil=torch.from_numpy(veil).to(self._device, self._dtype),
            weights=weights.view(batch, m, keys),
            by_tile=weights.view(batch, m, tiles, -1).transpose(1, 2),
            tiles=scores.view(batch, tiles, m, -1),
            mixed_tiles=mixed_tiles.view(batch * tiles, m, dim),
            mixed=mixed.view(batch, m, dim),
            answers=by_query(mixed.view(batch, m, dim)),
            out=out,
            out_by_head=out.view(asked.shape),
        )

    def _by_query_row(self, position: _Ints, m: int) -> _Ints:
        """The position that each query row stands at, [units, M], or [units, 1] where all of a unit stand at one."""
        if position.shape[1] == 1:
            return position
        by_row = np.repeat(position, self._units.per_kv, axis=1)
        return np.pad(by_row, ((0, 0), (0, m - by_row.shape[1])), mode="edge")

    def _pages(self, rows: Rows, row: _Ints, end: _Ints, first: _Ints, keys: int) -> _Ints:
        """Cache rows of each unit's keys and values: [2, units, kv_heads, parts]."""
        kv_heads = self._shape.kv_heads
        part = first[:, None] // self._part + np.arange(keys // self._part)  # [units, parts]
        index = np.where(part * self._part < end[:, None], part // self._parts, 0)
        block = rows.tables[row[:, None], index].astype(np.int64)
        head = np.arange(2 * kv_heads).reshape(2, 1, kv_heads, 1)
        return (block[:, None] * (2 * kv_heads) + head) * self._parts + (part % self._parts)[:, None]

    def _index(self, values: _Ints) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64).reshape(-1)).to(self._device)

    # ------------------------------------------------------------ once a layer

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        self._store.write(layer, self._written, kv)
        # waking a thread takes longer than what it could do for a small step
        torch.set_num_threads(self._used_threads)
        try:
            groups = self._groups[self._scoring[layer].window]
            if len(groups) == 1 and groups[0].everything:
                return self._attend_to_all(layer, q, groups[0])
            return self._attend_in_groups(layer, q, groups)
        finally:
            torch.set_num_threads(self._threads)

    def _attend_to_all(self, layer: int, q: torch.Tensor, group: _Group) -> torch.Tensor:
        if q is not self._q:  # a model may hand in the same tensor, filled anew, for every layer
            self._q, self._asking = q, q.view(group.asked.shape)
        return self._attend(layer, self._asking, group).to(q.dtype)

    def _attend_in_groups(self, layer: int, q: torch.Tensor, groups: list[_Group]) -> torch.Tensor:
        new = q.new_empty if self._all_real else q.new_zeros
        out = new(q.shape[0], self._heads * self._shape.head_dim)
        for group in groups:
            told = self._attend(layer, q.index_select(0, group.tokens).view(group.asked.shape), group)
            out[group.tokens[group.real]] = told[group.real].to(out.dtype)
        return out

    def _attend(self, layer: int, q: torch.Tensor, group: _Group) -> torch.Tensor:
        """q: of `group.asked`'s shape. Returns `group.out`."""
        self._store.read(layer, group.pages, group.gathered)
        scoring = self._scoring[layer]
        torch.mul(q, scoring.scale, out=group.asked)
        torch.bmm(group.queries, group.keys, out=group.scores)
        if scoring.softcap:
            group.scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
        group.veiled.add_(group.veil)
        torch.softmax(group.scores, 2, out=group.weights)
        if len(group.values) == len(group.weights):
            torch.bmm(group.weights, group.values, out=group.mixed)
        else:
            self._mix_tiles(group)
        group.out_by_head.copy_(group.answers)
        return group.out

    def _mix_tiles(self, group: _Group) -> None:
        group.tiles.copy_(group.by_tile)
        torch.bmm(group.tiles.flatten(0, 1), group.values, out=group.mixed_tiles)
        torch.sum(group.mixed_tiles.view(*group.tiles.shape[:2], *group.mixed.shape[1:]), dim=1, out=group.mixed)
