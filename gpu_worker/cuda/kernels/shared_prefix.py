"""Attention of several sequences to a prefix that they share, in one pass over its keys: an item of `decode_attention.py`.

A sequence fills R of the 16 rows of the matrix product, so that 16 / R of them fit into one (Hydragen: Juravsky et al. 2024, whose
prefix is one batched product; here it is spans of the work list, whose partial results each sequence joins with its own).
"""

# mypy: ignore-errors
# The bodies are Triton's language, not Python's.
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu_worker.cuda.kernels.online_softmax import as_factor, attend, join_splits, load_heads


@triton.jit
def attend_shared_span(
    item,  # int32: first row, first token, end, 0, index of the span, first own item of the first row, slot, rows
    items,  # the work list: the rows' first own items stand in the order of the rows
    h,  # KV head
    qkv,
    cache,
    table,
    out,
    partial,
    partial_ml,
    arrivals,
    q_norm,
    cosines,
    sines,
    scale,
    eps,
    kv_scales,
    WIDTH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QK_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One span of a shared prefix; arguments as in `decode_attention`. Row r of the product is query head r % R of sequence r // R."""
    row = tl.load(item)
    lo = tl.load(item + 1)
    hi = tl.load(item + 2)
    slot_table = table + tl.load(item + 6) * WIDTH
    count = tl.load(item + 7)
    own = items + tl.load(item + 5) * 8
    HEADS: tl.constexpr = KV_HEADS * R
    HALF: tl.constexpr = D // 2
    PLANE: tl.constexpr = KV_HEADS * PAGE * D
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    r = tl.arange(0, 16)
    d = tl.arange(0, DP)
    tiles = tl.arange(0, TILE)
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    sequence = r // R
    head = r % R
    served = sequence < count
    position = tl.load(own + sequence * 8 + 7, mask=served, other=0)
    if WINDOW:  # each sequence sees its own part of the span; tiles that none sees are left out
        seen_from = tl.maximum(position - (WINDOW - 1), 0)
        any_from = tl.min(tl.where(served, seen_from, hi), 0)
        lo = tl.maximum(lo, any_from // TILE * TILE)
    page = tl.load(slot_table + (lo + tiles) // PAGE, mask=lo + tiles < hi, other=0)
    angle = position[:, None] * HALF + (d % HALF)[None, :]
    c = tl.load(cosines + angle)
    s = tl.load(sines + angle) * tl.where(d < HALF, -1.0, 1.0)[None, :]
    if QK_NORM:
        qw = load_heads(q_norm + d, d, D, DP).to(tl.float32)
        qw2 = load_heads(q_norm + partner, d, D, DP).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    live = served[:, None]
    if DP != D:
        live = live & (d < D)[None, :]

    qp = qkv + (row + sequence)[:, None] * ROW + (h * R + head)[:, None] * D
    q = tl.load(qp + d[None, :], mask=live, other=0.0).to(tl.float32)
    q2 = tl.load(qp + partner[None, :], mask=live, other=0.0).to(tl.float32)
    if QK_NORM:
        qs = tl.rsqrt(tl.sum(q * q, 1) / D + eps)[:, None]
        q = q * qs * qw[None, :]
        q2 = q2 * qs * qw2[None, :]
    qr = as_factor((q * c + q2 * s).to(qkv.dtype.element_ty), kv_scales)

    if kv_scales is not None:
        scale = scale * tl.load(kv_scales)

    m = tl.full([16], -1.0e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, DP], tl.float32)
    for start in tl.range(lo, hi, TILE, num_stages=STAGES):
        token = start + tiles
        ok = token < hi
        seen = ok[None, :]
        if WINDOW:
            ok = ok & (token >= any_from)
            seen = seen & (token[None, :] >= seen_from[:, None])
        there = ok[:, None]
        if DP != D:
            there = there & (d < D)[None, :]
        at = cache + page.to(tl.int64)[:, None] * (2 * PLANE) + h * (PAGE * D) + (token % PAGE)[:, None] * D + d[None, :]
        page = tl.load(slot_table + (token + TILE) // PAGE, mask=token + TILE < hi, other=0)
        kt = tl.load(at, mask=there, other=0.0)
        vt = tl.load(at + PLANE, mask=there, other=0.0)
        m, total, acc = attend(qr, kt, vt, seen, m, total, acc, scale, True, SOFTCAP)

    if kv_scales is not None:
        acc = acc * tl.load(kv_scales + 1)
    cells = (tl.load(own + sequence * 8 + 5, mask=served, other=0) + tl.load(item + 4)) * KV_HEADS + h
    tl.store(partial + cells[:, None] * (RP * D) + head[:, None] * D + d[None, :], acc, mask=live, cache_modifier=".cg")
    tl.store(partial_ml + cells * (2 * RP) + head, m, mask=served, cache_modifier=".cg")
    tl.store(partial_ml + cells * (2 * RP) + RP + head, total, mask=served, cache_modifier=".cg")
    tl.debug_barrier()
    splits = tl.load(own + r * 8 + 3, mask=r < count, other=0)
    arrived = tl.atomic_add(arrivals + (row + r) * KV_HEADS + h, 1, mask=r < count, sem="acq_rel")
    last = (r < count) & (arrived == splits - 1)
    for i in range(count):
        if tl.sum(tl.where(last & (r == i), 1, 0), 0) > 0:
            mine = own + i * 8
            join_splits(out, partial, partial_ml, arrivals, row + i, tl.load(mine + 5), tl.load(mine + 3), h, d, KV_HEADS, R, RP, D, DP)
