"""Attention of one new token per sequence over its paged cache, with everything around it in the same kernel.

For each (work item, KV head) a program normalises and rotates the query heads that share the KV head (packed as rows of
one matrix product), attends to its span of cached tokens through the block table, and the program of a row's last span
also rotates the new key, adds the new token itself and writes K and V to the cache. Spans of one row are joined by
whichever program arrives last (flash decoding: Dao et al. 2023), always in the order of the spans.

The work list (`plan.cu`, `prepare`) is made on the device each step: the grid is fixed, what each program does is not. With PACKED,
it also holds spans that several rows share (`shared_prefix.py`).
"""

# mypy: ignore-errors
# The bodies are Triton's language, not Python's.
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu_worker.cuda.kernels.online_softmax import as_cached, as_factor, attend, capped, join_splits, load_heads
from gpu_worker.cuda.kernels.shared_prefix import attend_shared_span


@triton.jit
def decode_attention(
    qkv,  # [rows, (HEADS + 2 KV_HEADS) * D], not yet normalised or rotated
    cache,  # one layer's [blocks, 2, KV_HEADS, PAGE, D]
    table,  # [slots + 1, width] int32
    items,  # [n, 8] int32: row or -1, first token, end, splits, own partial, row's first partial, slot, position
    out,  # [rows, HEADS * D]
    partial,  # [partials, KV_HEADS, RP, D] fp32
    partial_ml,  # [partials, KV_HEADS, 2, RP] fp32: maximum, sum
    arrivals,  # [rows, KV_HEADS] int32, zero, left zero
    q_norm,
    k_norm,  # [D], read if QK_NORM
    cosines,
    sines,  # [positions, D / 2] fp32
    scale,  # softmax's, times log2(e)
    eps,
    kv_scales,  # [2] fp32, of this layer's keys and values, where the cache is fp8; else None
    WIDTH: tl.constexpr,  # of the table
    KV_HEADS: tl.constexpr,
    R: tl.constexpr,  # query heads per KV head
    RP: tl.constexpr,  # R rounded up to a power of two
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,  # tokens that a token sees, itself included; 0: all before it
    SOFTCAP: tl.constexpr,  # of the scores (Gemma 2); 0: none
    QK_NORM: tl.constexpr,
    PDL: tl.constexpr,
    PACKED: tl.constexpr = 0,  # whether items of splits 0 are spans that several rows share
):
    h = tl.program_id(0)
    item = items + tl.program_id(1) * 8
    if PACKED:  # noqa: SIM102 - decided when it is compiled
        if tl.load(item + 3) == 0:
            attend_shared_span(
                item, items, h, qkv, cache, table, out, partial, partial_ml, arrivals, q_norm, cosines, sines, scale, eps, kv_scales,
                WIDTH, KV_HEADS, R, RP, D, DP, PAGE, TILE, STAGES, WINDOW, SOFTCAP, QK_NORM, PDL,
            )  # fmt: skip
            return
    row = tl.load(item)
    lo = tl.load(item + 1)
    hi = tl.load(item + 2)
    splits = tl.load(item + 3)
    slot = tl.load(item + 6)
    position = tl.load(item + 7)
    HEADS: tl.constexpr = KV_HEADS * R
    HALF: tl.constexpr = D // 2
    PLANE: tl.constexpr = KV_HEADS * PAGE * D
    r = tl.arange(0, 16)
    d = tl.arange(0, DP)
    tiles = tl.arange(0, TILE)
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    slot_table = table + slot * WIDTH
    if WINDOW:  # tiles that lie wholly before it are left out; the work list knows nothing of windows
        seen_from = tl.maximum(position - (WINDOW - 1), 0)
        lo = tl.maximum(lo, seen_from // TILE * TILE)
    # All that earlier steps and `prepare` wrote may be read before the wait: it, and the linear before this kernel, are long done.
    page = tl.load(slot_table + (lo + tiles) // PAGE, mask=lo + tiles < hi, other=0)
    new_page = tl.load(slot_table + position // PAGE).to(tl.int64)
    c = tl.load(cosines + position * HALF + d % HALF)
    s = tl.load(sines + position * HALF + d % HALF) * tl.where(d < HALF, -1.0, 1.0)
    if QK_NORM:
        qw = load_heads(q_norm + d, d, D, DP).to(tl.float32)
        qw2 = load_heads(q_norm + partner, d, D, DP).to(tl.float32)
        kw = load_heads(k_norm + d, d, D, DP).to(tl.float32)
        kw2 = load_heads(k_norm + partner, d, D, DP).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if row < 0:
        return
    last = hi == position
    live = (r < R)[:, None]
    if DP != D:
        live = live & (d < D)[None, :]

    base = qkv + row * ((HEADS + 2 * KV_HEADS) * D)
    qp = base + (h * R + r)[:, None] * D
    kp = base + (HEADS + h) * D
    q = tl.load(qp + d[None, :], mask=live, other=0.0).to(tl.float32)
    q2 = tl.load(qp + partner[None, :], mask=live, other=0.0).to(tl.float32)
    k = load_heads(kp + d, d, D, DP).to(tl.float32)
    k2 = load_heads(kp + partner, d, D, DP).to(tl.float32)
    v_new = load_heads(base + (HEADS + KV_HEADS + h) * D + d, d, D, DP)
    if QK_NORM:
        qs = tl.rsqrt(tl.sum(q * q, 1) / D + eps)[:, None]
        q = q * qs * qw[None, :]
        q2 = q2 * qs * qw2[None, :]
        ks = tl.rsqrt(tl.sum(k * k, 0) / D + eps)
        k = k * ks * kw
        k2 = k2 * ks * kw2
    qr = (q * c[None, :] + q2 * s[None, :]).to(qkv.dtype.element_ty)
    kr = (k * c + k2 * s).to(qkv.dtype.element_ty)
    if kv_scales is not None:  # the new token as those that read it later will see it
        kr = as_cached(kr, tl.load(kv_scales))
        v_new = as_cached(v_new, tl.load(kv_scales + 1))
        scale = scale * tl.load(kv_scales)

    # the softmax begins with the new token, in the row's last span
    own = capped(tl.sum(qr.to(tl.float32) * kr.to(tl.float32)[None, :], 1), scale, SOFTCAP) * scale
    m = tl.where(last, own, -1.0e30)
    total = tl.zeros([16], tl.float32) + tl.where(last, 1.0, 0.0)
    acc = tl.zeros([16, DP], tl.float32) + tl.where(last, v_new.to(tl.float32), 0.0)[None, :]
    new = cache + new_page * (2 * PLANE) + h * (PAGE * D) + (position % PAGE) * D + d
    keep = (d < D if DP != D else d >= 0) & last
    tl.store(new, kr, mask=keep)
    tl.store(new + PLANE, v_new, mask=keep)

    qf = as_factor(qr, kv_scales)
    for start in tl.range(lo, hi, TILE, num_stages=STAGES):
        token = start + tiles
        ok = token < hi
        if WINDOW:
            ok = ok & (token >= seen_from)
        there = ok[:, None]
        if DP != D:
            there = there & (d < D)[None, :]
        at = cache + page.to(tl.int64)[:, None] * (2 * PLANE) + h * (PAGE * D) + (token % PAGE)[:, None] * D + d[None, :]
        page = tl.load(slot_table + (token + TILE) // PAGE, mask=token + TILE < hi, other=0)  # carried: keeps the pipeline's buffers apart
        kt = tl.load(at, mask=there, other=0.0)
        vt = tl.load(at + PLANE, mask=there, other=0.0)  # masked: a poisoned page must not reach 0 x NaN
        m, total, acc = attend(qf, kt, vt, ok[None, :], m, total, acc, scale, True, SOFTCAP)

    if kv_scales is not None:
        acc = acc * tl.load(kv_scales + 1)
    to = out + row * (HEADS * D) + (h * R + r)[:, None] * D + d[None, :]
    if splits == 1:
        tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=live)
    else:
        cell = tl.load(item + 4) * KV_HEADS + h
        tl.store(partial + cell * (RP * D) + r[:, None] * D + d[None, :], acc, mask=live, cache_modifier=".cg")
        tl.store(partial_ml + cell * (2 * RP) + r, m, mask=r < R, cache_modifier=".cg")
        tl.store(partial_ml + cell * (2 * RP) + RP + r, total, mask=r < R, cache_modifier=".cg")
        tl.debug_barrier()
        seen = tl.atomic_add(arrivals + row * KV_HEADS + h, 1, sem="acq_rel")
        if seen == splits - 1:
            join_splits(out, partial, partial_ml, arrivals, row, tl.load(item + 5), splits, h, d, KV_HEADS, R, RP, D, DP)
