"""How the torch backend's cache keeps keys and values: as they are, or in fp8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from gpu_worker.attention.interface import CacheShape
from gpu_worker.layers.fp8 import FP8, to_fp8


@dataclass(frozen=True)
class Fp8Cache:
    """A cache of bytes, each a number of e4m3. `dtype`: in which attention computes. `units`: of each layer's keys and of its values."""

    dtype: torch.dtype
    units: Sequence[tuple[float, float]]


class Store(Protocol):
    """Keys and values of all layers. Rows are those of the cache cut into pieces of one size."""

    dtype: torch.dtype  # that keys and values are read in

    def write(self, layer: int, rows: torch.Tensor, kv: torch.Tensor) -> None:
        """kv: [tokens, 2 · kv_heads, head_dim], keys first; rows: int64 [tokens · 2 · kv_heads], of head_dim each."""

    def read(self, layer: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        """out: [n, part · head_dim] of `dtype`; rows: int64 [n], keys in the first half, of part · head_dim each."""


class PlainStore:
    """Keys and values as they are, in the cache's own dtype."""

    def __init__(self, cache: torch.Tensor, shape: CacheShape, part: int) -> None:
        self.dtype = cache.dtype
        self._head_dim = shape.head_dim
        self._read_from = cache.view(shape.layers, -1, part * shape.head_dim).unbind()
        self._write_to = cache.view(shape.layers, -1, shape.head_dim).unbind()

    def write(self, layer: int, rows: torch.Tensor, kv: torch.Tensor) -> None:
        self._write_to[layer].index_copy_(0, rows, kv.reshape(-1, self._head_dim).to(self.dtype))

    def read(self, layer: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        torch.index_select(self._read_from[layer], 0, rows, out=out)


class Fp8Store:
    """e4m3 in a cache of bytes. What is too large becomes ±448 units; NaN stays NaN.

    A byte is read through a table of its 256 meanings, which on a CPU takes an eighth of the time of torch's cast.
    """

    def __init__(self, cache: torch.Tensor, shape: CacheShape, part: int, fp8: Fp8Cache) -> None:
        """cache: uint8, of interface.new_cache's shape."""
        self.dtype = fp8.dtype
        self._plain = PlainStore(cache, shape, part)
        units = torch.tensor(fp8.units, device=cache.device)  # [layers, 2]
        self._units = units.repeat_interleave(shape.kv_heads, 1).unsqueeze(-1)  # [layers, 2 · kv_heads, 1]
        meanings = torch.arange(256, dtype=torch.uint8, device=cache.device).view(FP8).float()
        self._meanings = (units.unsqueeze(-1) * meanings).to(fp8.dtype)  # [layers, 2, 256]

    def write(self, layer: int, rows: torch.Tensor, kv: torch.Tensor) -> None:
        self._plain.write(layer, rows, to_fp8(kv.float() / self._units[layer]).view(torch.uint8))

    def read(self, layer: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        stored = torch.empty(out.shape, dtype=torch.uint8, device=out.device)
        self._plain.read(layer, rows, stored)
        for meanings, bytes_, values in zip(self._meanings[layer], stored.chunk(2), out.chunk(2), strict=True):
            torch.index_select(meanings, 0, bytes_.view(-1).int(), out=values.view(-1))


def new_store(cache: torch.Tensor, shape: CacheShape, part: int, fp8: Fp8Cache | None) -> Store:
    """The store over interface.new_cache's `cache`, which holds bytes if it is fp8. part: tokens of a row that is read."""
    return PlainStore(cache, shape, part) if fp8 is None else Fp8Store(cache, shape, part, fp8)
