# mypy: ignore-errors
# The bodies are Triton's language, not Python's.
"""A tile of keys and values joined into a running softmax (Milakov & Gimelshein 2018)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(q, k, v, ok, m, total, acc, scale, MASKED: tl.constexpr):
    """q [rows, D], k and v [tokens, D]; ok (where MASKED) [rows or 1, tokens]; scale: softmax's times log2(e).

    m, total [rows] and acc [rows, D] are maximum, sum and weighted sum so far; returns the new ones.
    """
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        score = tl.where(ok, score, -1.0e30)
    top = tl.maximum(m, tl.max(score, 1) * scale)
    shrink = tl.exp2(m - top)
    p = tl.exp2(score * scale - top[:, None])  # one multiply-add
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return top, total, acc
