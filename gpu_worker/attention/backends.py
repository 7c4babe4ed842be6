"""Which attention backend the torch runner uses. A backend's package is imported only if it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_worker.attention.interface import Attention, CacheShape
from gpu_worker.attention.scoring import Scoring
from gpu_worker.attention.torch_backend import TorchAttention


def check_backend(name: str, device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    """Raise LoadError, one line, if a backend cannot serve here; before anything is loaded."""
    if name == "flash_attn":
        from gpu_worker.attention.flash_backend import check

        check(device, dtype, block_size, head_dim)


def make_backend(name: str, cache: torch.Tensor, shape: CacheShape, heads: int, scoring: Sequence[Scoring] | None = None) -> Attention:
    """The backend of that name (`flash_attn`, else `torch`) over interface.new_cache's `cache`; scoring: see `TorchAttention`."""
    if name == "flash_attn":
        from gpu_worker.attention.flash_backend import FlashAttention

        return FlashAttention(cache, shape, heads, scoring)
    return TorchAttention(cache, shape, heads, scoring)
