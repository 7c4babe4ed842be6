"""The element-wise parts of a layer, each a function, so that a device may put a kernel in its place.

On the CPU every one gives a row the same bits whatever rows stand beside it. torch computes the tail of an array, or of a
thread's share of it, with other instructions than its body, which for exponentials gives other bits; so `silu_mul` takes
rows in such numbers that torch cuts them up only between rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

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
    """silu(gate) · up of [rows, 2 · width], gate first; returns [rows, width], float32 on the CPU."""
    if gate_up.is_cuda:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    rows, width = gate.shape
    if rows * width <= _UNDIVIDED:
        return F.silu(gate).mul_(up)
    out = torch.empty((rows, width), dtype=gate.dtype)
    at = 0
    for count in _even_shares(rows, width, torch.get_num_threads()):
        torch.mul(F.silu(gate[at : at + count]), up[at : at + count], out=out[at : at + count])
        at += count
    return out


def _even_shares(rows: int, width: int, threads: int) -> list[int]:
    """Cut rows into pieces of which torch gives every thread the same number of whole rows, or all to one thread."""
    each = rows // threads
    even = [each * threads] if each * width > _UNDIVIDED else []
    alone = max(1, _UNDIVIDED // width)
    rest = rows - sum(even)
    return even + [min(alone, rest - at) for at in range(0, rest, alone)]


def rotation(x: torch.Tensor, turns: torch.Tensor) -> Callable[[], object]:
    """What applies rotary embedding (Su et al. 2021) to x, in place, each time that it is called.

    Each pair of neighbours in a head is a complex number, multiplied by its turn.
    x: [rows, heads, dim], any strides that leave pairs side by side. turns: complex64 [rows, 1, dim / 2].
    """
    pairs = x.view(*x.shape[:-1], -1, 2)
    if x.dtype == torch.float32:
        return functools.partial(torch.view_as_complex(pairs).mul_, turns)
    return lambda: pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()).mul_(turns)))
