"""Attention of prefill chunks (and of any row) over the paged cache, causal, after K and V of the step are in it.

A program takes one tile of a row: ROWS / RP consecutive tokens with the query heads that share a KV head, packed as the
rows of one matrix product. Keys before the tile's first token need no mask and run first (flash attention 2: Dao 2023).
"""

# mypy: ignore-errors
# The bodies are Triton's language, not Python's.
from __future__ import annotations

import triton
import triton.language as tl

from gpu_worker.cuda.kernels.online_softmax import attend


@triton.jit
def prefill_attention(
    qkv,  # [tokens, (HEADS + 2 KV_HEADS) * D], q normalised and rotated
    cache,  # one layer's [blocks, 2, KV_HEADS, PAGE, D], the step's tokens in it
    table,  # [slots + 1, width] int32
    tiles,  # [n, 2] int32: row, first token of the tile in the row
    rows,  # [rows, 8] int32: slot, first position, count, -, offset among the step's tokens, …
    out,  # [tokens, HEADS * D]
    scale,  # softmax's, times log2(e)
    WIDTH: tl.constexpr,  # of the table
    KV_HEADS: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    h = tl.program_id(0)
    n = tl.num_programs(1) - 1 - tl.program_id(1)  # later tiles of a row are longer: first
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
    d = tl.arange(0, D)
    t = tl.arange(0, TILE)
    token = at + i // RP
    head = h * R + i % RP
    live = (token < count) & (i % RP < R)
    q = tl.load(
        qkv + (offset + token).to(tl.int64)[:, None] * ((HEADS + 2 * KV_HEADS) * D) + head[:, None] * D + d[None, :],
        mask=live[:, None],
        other=0.0,
    )
    position = first + token
    slot_table = table + slot * WIDTH
    plain = (first + at) // TILE * TILE  # keys below lie before every query of the tile
    end = first + tl.minimum(at + TOKENS, count)
    m = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    page = tl.load(slot_table + t // PAGE, mask=t < end, other=0)
    for start in tl.range(0, plain, TILE, num_stages=STAGES):
        key = start + t
        p_at = cache + page.to(tl.int64)[:, None] * (2 * PLANE) + h * (PAGE * D) + (key % PAGE)[:, None] * D + d[None, :]
        page = tl.load(slot_table + (key + TILE) // PAGE, mask=key + TILE < end, other=0)
        m, total, acc = attend(q, tl.load(p_at), tl.load(p_at + PLANE), True, m, total, acc, scale, False)
    for start in tl.range(plain, end, TILE, num_stages=STAGES):
        key = start + t
        ok = key < end
        p_at = cache + page.to(tl.int64)[:, None] * (2 * PLANE) + h * (PAGE * D) + (key % PAGE)[:, None] * D + d[None, :]
        page = tl.load(slot_table + (key + TILE) // PAGE, mask=key + TILE < end, other=0)
        k = tl.load(p_at, mask=ok[:, None], other=0.0)
        v = tl.load(p_at + PLANE, mask=ok[:, None], other=0.0)
        m, total, acc = attend(q, k, v, key[None, :] <= position[:, None], m, total, acc, scale, True)
    to = out + (offset + token).to(tl.int64)[:, None] * (HEADS * D) + head[:, None] * D + d[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=live[:, None])
