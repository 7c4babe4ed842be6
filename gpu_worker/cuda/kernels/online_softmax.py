# mypy: ignore-errors
# The bodies are Triton's language, not Python's.
"""A tile of keys and values joined into a running softmax (Milakov & Gimelshein 2018), and partial results into one."""

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
def as_fp8(x, scale):
    """x in units of `scale`, in fp8 (e4m3, finite, up to 448); what is too large becomes 448, NaN stays NaN."""
    return tl.clamp(x.to(tl.float32) / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def as_cached(x, scale):
    """What an fp8 cache holds of x, in x's type."""
    return as_fp8(x, scale).to(x.dtype)


@triton.jit
def as_factor(q, kv_scales):
    """q in the type in which it is multiplied by keys: float16 instead of bf16 where these are fp8 (`kv_scales` is not None).

    A card has one instruction that makes two e4m3 float16, which bf16 takes two more than. Keys and values of up to 448, weights of up
    to 1 and any query below 65,504 fit; sums are float32."""
    if kv_scales is None:
        return q
    elif q.dtype == tl.bfloat16:
        return q.to(tl.float16)
    else:
        return q


@triton.jit
def attend(q, k, v, ok, m, total, acc, scale, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """q [rows, D], k and v [tokens, D], of q's type or fp8 (q then as `as_factor` makes it); ok (where MASKED) [rows or 1, tokens]; scale:
    softmax's times log2(e).

    m, total [rows] and acc [rows, D] are maximum, sum and weighted sum so far; returns the new ones.
    """
    k = k.to(q.dtype)
    v = v.to(q.dtype)
    score = capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, SOFTCAP)
    if MASKED:
        score = tl.where(ok, score, float("-inf"))  # times scale it stays that; a large number, fused with `- top`, would not cancel
    top = tl.maximum(m, tl.max(score, 1) * scale)
    shrink = tl.exp2(m - top)
    p = tl.exp2(score * scale - top[:, None])  # one multiply-add
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def join_splits(
    out, partial, partial_ml, arrivals, row, first, splits, h, d,
    KV_HEADS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Write a row's result of KV head `h` from its partial ones, `first` and those behind it; its count of arrivals is zero again.

    Shapes as in `decode_attention`; d: [DP].
    """
    rr = tl.arange(0, RP)
    some = tl.arange(0, 32 // RP)  # partials at a time; more take too many registers
    m_all = tl.full([RP], -1.0e30, tl.float32)
    l_all = tl.zeros([RP], tl.float32)
    acc_all = tl.zeros([RP, DP], tl.float32)
    cell_ok = (rr < R)[:, None]
    if DP != D:
        cell_ok = cell_ok & (d < D)[None, :]
    for begin in range(0, splits, 32 // RP):
        present = begin + some < splits
        cells = (first + begin + some) * KV_HEADS + h
        ml = partial_ml + cells[:, None] * (2 * RP) + rr[None, :]
        ms = tl.load(ml, mask=present[:, None], other=-1.0e30, cache_modifier=".cg")
        ls = tl.load(ml + RP, mask=present[:, None], other=0.0, cache_modifier=".cg")
        os = tl.load(
            partial + cells[:, None, None] * (RP * D) + rr[None, :, None] * D + d[None, None, :],
            mask=present[:, None, None] & cell_ok[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        top = tl.maximum(m_all, tl.max(ms, 0))
        shrink = tl.exp2(m_all - top)
        weight = tl.where(present[:, None], tl.exp2(ms - top[None, :]), 0.0)
        l_all = l_all * shrink + tl.sum(weight * ls, 0)
        acc_all = acc_all * shrink[:, None] + tl.sum(weight[:, :, None] * os, 0)
        m_all = top
    tl.store(
        out + row * (KV_HEADS * R * D) + (h * R + rr)[:, None] * D + d[None, :],
        (acc_all / l_all[:, None]).to(out.dtype.element_ty),
        mask=cell_ok,
    )
    tl.store(arrivals + row * KV_HEADS + h, 0)
