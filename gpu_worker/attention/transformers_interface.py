"""What transformers' models call in the place of their own attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.errors import LoadError

NAME = "pagewire"  # among transformers' attention implementations
OUTLINE = "pagewire_outline"  # the same, of a model whose layers are to be asked what they see
KEYWORD = "paged"  # under which a forward pass is given its `Paged`; models hand on what they do not know


@dataclass(frozen=True)
class Call:
    """One layer's call. query: [1, heads, tokens, head_dim], key and value: [1, kv_heads, tokens, head_dim], rotated."""

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None  # with OUTLINE what `mask_window` reads, else None
    options: Mapping[str, Any]  # scaling, sliding_window, softcap, …


Paged = Callable[[Call], torch.Tensor]  # returns [1, tokens, heads, head_dim of the values]


def register() -> None:
    """Make both known as `attn_implementation`. For NAME transformers makes no mask; it keeps no cache without `use_cache`.

    What transformers would say about a model while it is loaded is kept out of the worker's log: errors are raised.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    AttentionInterface.register(NAME, _attention)
    AttentionInterface.register(OUTLINE, _attention)
    AttentionMaskInterface.register(OUTLINE, _mask)


def mask_window(mask: torch.Tensor | None) -> int | None:
    """Of a mask made for OUTLINE: how many positions a token sees, its own the last; 0 for all; None if the mask says otherwise."""
    window: int | None = getattr(mask, "window", None)
    return window


def _mask(*, mask_function: Callable[..., torch.Tensor], config: Any, **sizes: Any) -> torch.Tensor:
    """A tensor without content that knows its window; models hand it to their layers, or change it, and then it is another."""
    mask = torch.empty((1, 1, sizes["q_length"], sizes["kv_length"]), dtype=torch.bool, device="meta")
    mask.window = _window(mask_function, int(config.max_position_embeddings))  # type: ignore[attr-defined]
    return mask


def _window(sees: Callable[..., torch.Tensor], length: int) -> int | None:
    """sees(batch, head, query, key): whether a query sees a key, by their positions."""
    with torch.device("cpu"):
        zero, keys = torch.tensor(0), torch.arange(length)
        at = [length - 1, length // 2, length // 3, 0]
        seen = [sees(zero, zero, torch.tensor(query), keys) for query in at]
    window = int(seen[0].sum())
    if any(not torch.equal(row, (keys <= query) & (keys > query - window)) for query, row in zip(at, seen)):
        return None
    return window if window < length else 0


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    paged: Paged | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    if paged is None:
        raise LoadError("its layers hand no options to their attention")
    return paged(Call(module, query, key, value, attention_mask, options)), None
