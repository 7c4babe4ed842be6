"""Paged attention by the package `flash-attn` (FlashAttention-2: Dao 2023), on an NVIDIA card, in bf16 or fp16.

Rows of one token go through `flash_attn_with_kvcache`, which splits long contexts over the card; rows of more through
`flash_attn_varlen_func`, which does not. Both read the pages where they are: a page's keys are a strided view of our cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.attention.interface import CacheShape, Rows, cache_rows
from gpu_worker.attention.scoring import Scoring, plain
from gpu_worker.errors import LoadError

PAGE = 256  # tokens that a page must be a multiple of
MAX_HEAD_DIM = 256


@dataclass
class _Group:
    """The rows of one call. All tensors lie on the device."""

    tokens: torch.Tensor | None  # [n] which of the step's tokens these are; None: all, in order
    tables: torch.Tensor  # [rows, width] int32
    keys: torch.Tensor  # [rows] int32: tokens that a row's last query sees
    starts: torch.Tensor | None  # [rows + 1] int32: where each row's queries begin; None: one query a row
    key_starts: torch.Tensor | None  # [rows + 1] int32: sums of `keys`
    most_queries: int
    most_keys: int


class FlashAttention:
    """See the module. `cache` is interface.new_cache's, such that `check` allows it. Raises LoadError without the package."""

    name = "flash_attn"

    def __init__(self, cache: torch.Tensor, shape: CacheShape, heads: int, scoring: Sequence[Scoring] | None = None) -> None:
        """scoring: of each layer; by default all keys by 1 / √head_dim."""
        self._with_cache, self._varlen = _functions()
        self._options = [_options(s) for s in scoring or plain(shape.layers, shape.head_dim)]
        self._shape, self._heads = shape, heads
        self._device, self._dtype = cache.device, cache.dtype
        by_token = cache.transpose(3, 4)  # [layers, blocks + 1, 2, block_size, kv_heads, head_dim]
        self._keys, self._values = by_token[:, :, 0], by_token[:, :, 1]
        self._write_to = cache.view(shape.layers, -1, shape.head_dim)
        self._written = torch.empty(0, dtype=torch.int64)
        self._groups: list[_Group] = []

    def begin(self, rows: Rows) -> None:
        self._written = torch.from_numpy(cache_rows(self._shape, rows)).to(self._device)
        single = rows.counts == 1
        self._groups = [self._group(rows, np.flatnonzero(of)) for of in (single, ~single) if of.any()]

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        self._write_to[layer].index_copy_(0, self._written, kv.reshape(-1, self._shape.head_dim).to(self._dtype))
        keys, values, options = self._keys[layer], self._values[layer], self._options[layer]
        out = torch.empty_like(q)
        for group in self._groups:
            asked = q if group.tokens is None else q.index_select(0, group.tokens)
            if group.starts is None:
                got = self._with_cache(asked[:, None], keys, values, cache_seqlens=group.keys, block_table=group.tables, **options).squeeze(
                    1
                )
            else:
                got = self._varlen(
                    asked,
                    keys,
                    values,
                    group.starts,
                    group.key_starts,
                    group.most_queries,
                    group.most_keys,
                    block_table=group.tables,
                    **options,
                )
            if group.tokens is None:
                return got.reshape(len(q), -1)
            out.index_copy_(0, group.tokens, got)
        return out.view(len(q), -1)

    def _group(self, rows: Rows, of: npt.NDArray[np.int64]) -> _Group:
        counts, dead = rows.counts[of].astype(np.int64), rows.dead[of]
        keys = np.where(dead, 1, rows.starts[of] + counts)
        width = -(-int(keys.max()) // self._shape.block_size)
        tables = np.where(dead[:, None], self._shape.dummy, rows.tables[of, :width])
        # What lies behind a row's end is not read, but is an index all the same.
        tables = np.where(np.arange(width) * self._shape.block_size < keys[:, None], tables, self._shape.dummy)
        queries = np.concatenate(([0], np.cumsum(counts)))
        all_first = np.cumsum(rows.counts, dtype=np.int64) - rows.counts
        tokens = np.repeat(all_first[of] - queries[:-1], counts) + np.arange(queries[-1])
        one_each = bool((counts == 1).all())
        return _Group(
            tokens=None if len(of) == len(rows.counts) else torch.from_numpy(tokens).to(self._device),
            tables=self._int32(tables),
            keys=self._int32(keys),
            starts=None if one_each else self._int32(queries),
            key_starts=None if one_each else self._int32(np.concatenate(([0], np.cumsum(keys)))),
            most_queries=int(counts.max()),
            most_keys=int(keys.max()),
        )

    def _int32(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(self._device)


def _options(scoring: Scoring) -> dict[str, Any]:
    """How the package says it. Its window counts the keys before a query's own, −1 for all."""
    return {
        "causal": True,
        "softmax_scale": scoring.scale,
        "window_size": (scoring.window - 1, 0) if scoring.window else (-1, -1),
        "softcap": scoring.softcap,
    }


def check(device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    """Raise LoadError, one line, where the card, the dtype, the pages, the head dimension or a missing package forbid flash_attn."""
    if device.type != "cuda":
        raise LoadError("--attention flash_attn needs an NVIDIA card; --attention torch runs on the CPU")
    if dtype not in (torch.bfloat16, torch.float16):
        raise LoadError(f"--attention flash_attn computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}: see --dtype")
    if block_size % PAGE:
        raise LoadError(f"--attention flash_attn needs blocks of a multiple of {PAGE} tokens, not {block_size}: --block-size {PAGE}")
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        raise LoadError(f"--attention flash_attn takes head dimensions that are multiples of 8 up to {MAX_HEAD_DIM}, not {head_dim}")
    _functions()


def _functions() -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    try:
        import flash_attn
    except ImportError as error:
        raise LoadError(
            f"--attention flash_attn needs the package flash-attn (pip install 'pagewire[flash]' --no-build-isolation): {error}"
        ) from error
    return flash_attn.flash_attn_with_kvcache, flash_attn.flash_attn_varlen_func
