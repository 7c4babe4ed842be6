"""Which attention backend the torch runner uses. A backend's package is imported only if it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_worker.attention.interface import Attention, CacheShape
from gpu_worker.attention.scoring import Scoring
from gpu_worker.attention.stores import Fp8Cache
from gpu_worker.attention.torch_backend import TorchAttention
from gpu_worker.errors import LoadError


def check_backend(name: str, device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int, fp8: bool = False) -> None:
    """Raise LoadError, one line, if a backend cannot serve here; before anything is loaded. fp8: whether the cache is to be fp8."""
    if name == "flash_attn":
        if fp8:
            raise LoadError("--attention flash_attn reads no fp8 cache; with --kv-cache-dtype fp8 take --attention torch or triton")
        from gpu_worker.attention.flash_backend import check

        check(device, dtype, block_size, head_dim)


def make_backend(
    name: str,
    cache: torch.Tensor,
    shape: CacheShape,
    heads: int,
    scoring: Sequence[Scoring] | None = None,
    fp8: Fp8Cache | None = None,
) -> Attention:
    """The backend of that name (`flash_attn`, else `torch`) over interface.new_cache's `cache`; scoring, fp8: see `TorchAttention`."""
    if name == "flash_attn":
        from gpu_worker.attention.flash_backend import FlashAttention

        return FlashAttention(cache, shape, heads, scoring)
    return TorchAttention(cache, shape, heads, scoring, fp8)
