"""The paged cache and what a backend does with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from protocol.columns import Int32


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a paged cache. One page more than `blocks` exists: the dummy page, which dead rows write to."""

    layers: int
    blocks: int
    kv_heads: int
    block_size: int  # tokens of a page
    head_dim: int

    @property
    def dummy(self) -> int:
        """The dummy page's index."""
        return self.blocks

    @property
    def elements_per_block(self) -> int:
        """Keys and values of one block over all layers."""
        return self.layers * 2 * self.kv_heads * self.block_size * self.head_dim


def new_cache(shape: CacheShape, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[layers, blocks + 1, 2 (keys, values), kv_heads, block_size, head_dim], zeroed: stale NaNs would spread."""
    return torch.zeros((shape.layers, shape.blocks + 1, 2, shape.kv_heads, shape.block_size, shape.head_dim), device=device, dtype=dtype)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a step stand: row i computes positions starts[i] … starts[i] + counts[i] − 1.

    Its tokens lie one after another in the step's flat token dimension, rows in order. All on the host.
    """

    starts: Int32  # [rows]
    counts: Int32  # [rows]
    tables: Int32  # [rows, width] block of each index; entries beyond a row's end are not read
    dead: npt.NDArray[np.bool_]  # [rows]: keys and values go to the dummy page, the result does not matter


def cache_rows(shape: CacheShape, rows: Rows) -> npt.NDArray[np.int64]:
    """Where the step's keys and values go: rows of one layer's cache as [-1, head_dim], token by token, [tokens · 2 · kv_heads]."""
    counts = rows.counts.astype(np.int64)
    row = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(len(row)) - (np.cumsum(counts) - counts)[row] + rows.starts[row]
    blocks = np.where(rows.dead[row], shape.dummy, rows.tables[row, positions // shape.block_size])
    heads = np.arange(2 * shape.kv_heads)
    flat = (blocks[:, None] * (2 * shape.kv_heads) + heads) * shape.block_size + (positions % shape.block_size)[:, None]
    return flat.reshape(-1)


class Attention(Protocol):
    """One backend. `begin` is called once a step, `attend` once a layer, for the rows of that step."""

    name: str

    def begin(self, rows: Rows) -> None:
        """Prepare what all layers of a step share."""

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Write the keys and values of the step's tokens into their blocks, then attend.

        q: [tokens, heads, head_dim]. kv: [tokens, 2 · kv_heads, head_dim], rotated keys first; any strides. Returns
        [tokens, heads · head_dim]. Each token sees its row's positions up to its own.
        """
