"""The element-wise parts of a layer, each a function, so that a device may put a kernel in its place.

On the CPU every one gives a row the same bits whatever rows stand beside it. Two of torch's own do not: `silu` and
`sigmoid` compute the tail of an array, or of a thread's share of it, with other instructions than its body.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up of [rows, 2 · width], gate first; returns [rows, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    denominator = torch.neg(gate).exp_().add_(1.0)
    return torch.div(gate, denominator, out=denominator).mul_(up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) with each head's first half paired with its second.

    x: [rows, heads, dim], any strides; cos, sin: [rows, 1, dim / 2]. Returns a new tensor of x's shape.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out
