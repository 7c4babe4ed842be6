"""How attention in plain torch cuts a step into units, and the memory that it works in. No torch, so that a planner can ask.

A unit is some queries of one row beside all keys that they see, of all heads. Units of one size are computed together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TILE = 128  # keys of a tile
QUERIES = (1, 8, 64)  # queries of a unit; a longer prefill is cut
GROUP_BYTES = 8 << 20  # of units that are computed together: they stay in the processor's cache
UNIT_BYTES = 64 << 20  # of one unit; where keys are many, it has fewer queries


@dataclass(frozen=True)
class Units:
    """Sizes of units, in elements: of float32 where bytes are meant."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def per_kv(self) -> int:
        """Heads that share one of keys and values."""
        return self.heads // self.kv_heads

    def rows(self, queries: int) -> int:
        """Query rows of one key/value head, padded to a multiple of 4."""
        return -(-queries * self.per_kv // 4) * 4

    def sizes(self, units: int, queries: int, keys: int) -> tuple[int, int, int, int]:
        """Scratch memory of so many units together: keys and values, scores, weights, what they mix. Each tile's share of that takes
        the place of the weights."""
        batch, m = units * self.kv_heads, self.rows(queries)
        weights = m * max(keys, -(-keys // TILE) * self.head_dim)
        return 2 * batch * keys * self.head_dim, batch * m * keys, batch * weights, batch * m * self.head_dim

    def elements(self, units: int, queries: int, keys: int) -> int:
        """All of that."""
        return sum(self.sizes(units, queries, keys))

    def most_queries(self, keys: int) -> int:
        """Queries that a unit beside so many keys has at most."""
        return max((q for q in QUERIES if 4 * self.elements(1, q, keys) <= UNIT_BYTES), default=QUERIES[0])

    def together(self, queries: int, keys: int) -> int:
        """How many units are computed together at most."""
        return max(1, GROUP_BYTES // (4 * self.elements(1, queries, keys)))

    def scratch(self, length: int) -> int:
        """Scratch memory of a step whose rows have up to `length` tokens, at most."""
        return max(self.elements(self.together(q, keys), q, keys) for q, keys in self._every(length))

    def _every(self, length: int) -> Iterator[tuple[int, int]]:
        """Queries and keys of every unit that a row of up to `length` tokens can have."""
        keys = 0
        while keys < length:
            keys = round_up(keys + 1)
            yield from ((q, keys) for q in QUERIES if q <= self.most_queries(keys))


def round_up(keys: int) -> int:
    """64, 96, then 1, 2, 3, 4, 6, 8, 12, 16, 24, … tiles: units of like length are computed together."""
    if keys <= TILE * 3 // 4:
        return TILE // 2 if keys <= TILE // 2 else TILE * 3 // 4
    tiles = -(-keys // TILE)
    if tiles > 4:
        power: int = 1 << (tiles - 1).bit_length()
        tiles = power * 3 // 4 if tiles <= power * 3 // 4 else power
    return tiles * TILE
