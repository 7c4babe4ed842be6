# mypy: ignore-errors
# The bodies are Triton's language, not Python's.
"""A tile of keys and values joined into a running softmax (Milakov & Gimelshein 2018)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def capped(score, scale, SOFTCAP: tl.constexpr):
    """SOFTCAP · tanh(score · softmax's scale / SOFTCAP), again to be multiplied by `scale`; nothing is done where SOFTCAP is 0."""
    if SOFTCAP == 0:
        return score
    else:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(score * (scale * (2.0 / SOFTCAP))))  # scale holds log2(e)
        return tanh * (SOFTCAP * 1.4426950408889634 / scale)


@triton.jit
def load_heads(pointers, d, D: tl.constexpr, DP: tl.constexpr):
    """Load vectors of DP elements, indexed by `d` in the last dimension, whose elements from D on are zeros and not in memory."""
    if DP == D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=d < D, other=0.0)


@triton.jit
def as_cached(x, scale):
    """What an fp8 cache (e4m3, finite, up to 448) holds of x, in x's type and in units of `scale`; NaN stays NaN."""
    fits = tl.clamp(x.to(tl.float32) / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return fits.to(tl.float8e4nv).to(x.dtype)


@triton.jit
def attend(q, k, v, ok, m, total, acc, scale, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """q [rows, D], k and v [tokens, D], of q's type or fp8; ok (where MASKED) [rows or 1, tokens]; scale: softmax's times log2(e).

    m, total [rows] and acc [rows, D] are maximum, sum and weighted sum so far; returns the new ones.
    """
    k = k.to(q.dtype)
    v = v.to(q.dtype)
    score = capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, SOFTCAP)
    if MASKED:
        score = tl.where(ok, score, -1.0e30)
    top = tl.maximum(m, tl.max(score, 1) * scale)
    shrink = tl.exp2(m - top)
    p = tl.exp2(score * scale - top[:, None])  # one multiply-add
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return top, total, acc
