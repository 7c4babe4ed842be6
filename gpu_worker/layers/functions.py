"""The element-wise parts of a layer, each a function, so that a device may put a kernel in its place.

On the CPU every one gives a row the same bits whatever rows stand beside it. torch computes the tail of an array, or of a
thread's share of it, with other instructions than its body, which for exponentials gives other bits; so `silu_mul` takes
rows in such numbers that torch does not cut them up.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

_UNDIVIDED = 32767  # elements that torch computes on one thread


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019)."""
    width = x.shape[-1]
    if x.is_cuda:
        return F.rms_norm(x, (width,), weight, eps)
    # the same in half the time that F.rms_norm takes for a few rows
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * torch.addcmul(_constant(eps), norm, norm, value=1 / width).rsqrt_()).mul_(weight)


@functools.lru_cache
def _constant(value: float) -> torch.Tensor:
    return torch.tensor(value)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up of [rows, 2 · width], gate first; returns [rows, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    rows = max(1, _UNDIVIDED // gate.shape[1])
    if gate.shape[0] <= rows or gate.is_cuda:
        return F.silu(gate).mul_(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for at in range(0, gate.shape[0], rows):
        torch.mul(F.silu(gate[at : at + rows]), up[at : at + rows], out=out[at : at + rows])
    return out


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021), in place, with each head's first half paired with its second.

    x: [rows, heads, dim], any strides. cos, sin: [rows, 1, dim], both halves written out, the first of sin negated.
    """
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    return x.mul_(cos).addcmul_(swapped, sin)
