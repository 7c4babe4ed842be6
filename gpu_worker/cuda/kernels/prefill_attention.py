"""Attention of prefill chunks (and of any row) over the paged cache, causal, after K and V of the step are in it.

A program takes one tile of a row: ROWS / RP consecutive tokens with the query heads that share a KV head, packed as the
rows of one matrix product. Keys before the tile's first token need no mask and run first (flash attention 2: Dao 2023).
"""

# mypy: ignore-errors
# The bodies are Triton's language, not Python's.
from __future__ import annotations

import triton
import triton.language as tl

from gpu_worker.cuda.kernels.online_softmax import as_factor, attend, load_heads


@triton.jit
def prefill_attention(
    qkv,  # [tokens, (HEADS + 2 KV_HEADS) * D], q normalised and rotated
    cache,  # one layer's [blocks, 2, KV_HEADS, PAGE, D], the step's tokens in it
    table,  # [slots + 1, width] int32
    tiles,  # [n, 2] int32: row, first token of the tile in the row; longest first
    rows,  # [rows, 8] int32: slot, first position, count, -, offset among the step's tokens, …
    out,  # [tokens, HEADS * D]
    scale,  # softmax's, times log2(e)
    kv_scales,  # [2] fp32, of this layer's keys and values, where the cache is fp8; else None
    WIDTH: tl.constexpr,  # of the table
    KV_HEADS: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,  # tokens that a token sees, itself included; 0: all before it
    SOFTCAP: tl.constexpr,  # of the scores (Gemma 2); 0: none
):
    h = tl.program_id(0)
    n = tl.program_id(1)
    row = tl.load(tiles + 2 * n)
    at = tl.load(tiles + 2 * n + 1)
    if row < 0:  # launched for nothing
        return
    slot = tl.load(rows + row * 8)
    first = tl.load(rows + row * 8 + 1)
    count = tl.load(rows + row * 8 + 2)
    offset = tl.load(rows + row * 8 + 4)
    HEADS: tl.constexpr = KV_HEADS * R
    TOKENS: tl.constexpr = ROWS // RP
    PLANE: tl.constexpr = KV_HEADS * PAGE * D
    i = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    t = tl.arange(0, TILE)
    token = at + i // RP
    head = h * R + i % RP
    live = ((token < count) & (i % RP < R))[:, None]
    if DP != D:
        live = live & (d < D)[None, :]
    q = tl.load(
        qkv + (offset + token).to(tl.int64)[:, None] * ((HEADS + 2 * KV_HEADS) * D) + head[:, None] * D + d[None, :],
        mask=live,
        other=0.0,
    )
    q = as_factor(q, kv_scales)
    if kv_scales is not None:
        scale = scale * tl.load(kv_scales)
    position = first + token
    slot_table = table + slot * WIDTH
    plain = (first + at) // TILE * TILE  # keys below lie before every query of the tile
    begin = 0
    if WINDOW:  # keys that the tile's first query does not see are left out, all others masked
        begin = tl.maximum(first + at - (WINDOW - 1), 0) // TILE * TILE
        plain = begin
    end = first + tl.minimum(at + TOKENS, count)
    m = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    page = tl.load(slot_table + (begin + t) // PAGE, mask=begin + t < end, other=0)
    for start in tl.range(begin, plain, TILE, num_stages=STAGES):
        key = start + t
        p_at = cache + page.to(tl.int64)[:, None] * (2 * PLANE) + h * (PAGE * D) + (key % PAGE)[:, None] * D + d[None, :]
        page = tl.load(slot_table + (key + TILE) // PAGE, mask=key + TILE < end, other=0)
        k = load_heads(p_at, d[None, :], D, DP)
        v = load_heads(p_at + PLANE, d[None, :], D, DP)
        m, total, acc = attend(q, k, v, True, m, total, acc, scale, False, SOFTCAP)
    for start in tl.range(plain, end, TILE, num_stages=STAGES):
        key = start + t
        ok = key < end
        if WINDOW:
            ok = ok & (key > first + at - WINDOW)
        p_at = cache + page.to(tl.int64)[:, None] * (2 * PLANE) + h * (PAGE * D) + (key % PAGE)[:, None] * D + d[None, :]
        page = tl.load(slot_table + (key + TILE) // PAGE, mask=key + TILE < end, other=0)
        there = ok[:, None]
        if DP != D:
            there = there & (d < D)[None, :]
        k = tl.load(p_at, mask=there, other=0.0)
        v = tl.load(p_at + PLANE, mask=there, other=0.0)
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        m, total, acc = attend(q, k, v, seen, m, total, acc, scale, True, SOFTCAP)
    if kv_scales is not None:
        acc = acc * tl.load(kv_scales + 1)
    to = out + (offset + token).to(tl.int64)[:, None] * (HEADS * D) + head[:, None] * D + d[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=live)
