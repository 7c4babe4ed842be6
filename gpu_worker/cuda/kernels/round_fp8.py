"""Activations rounded to fp8 (e4m3), with a scale for each row or for each 128 neighbours in it, before an 8-bit product.

Grid (rows, 1) for rows; (rows, groups / SPAN) for groups, where rows is a multiple of 4, as cuBLAS reads their scales.
"""

# mypy: ignore-errors
# The bodies are Triton's language, not Python's.
from __future__ import annotations

import triton
import triton.language as tl

from gpu_worker.cuda.kernels.online_softmax import as_fp8


@triton.jit
def round_rows(
    x,  # [rows, WIDTH]
    q,  # [rows, WIDTH] fp8
    scales,  # [rows] fp32
    input_scale,  # fp32, to be every row's scale; None: a row's own
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    if input_scale is None:
        most = tl.zeros([BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            values = tl.load(x + row.to(tl.int64) * WIDTH + start + at, mask=start + at < WIDTH, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
        scale = tl.maximum(tl.max(most, 0) / 448.0, 1.0e-12)
    else:
        scale = tl.load(input_scale)
    tl.store(scales + row, scale)
    for start in range(0, WIDTH, BLOCK):
        values = tl.load(x + row.to(tl.int64) * WIDTH + start + at, mask=start + at < WIDTH, other=0.0)
        tl.store(q + row.to(tl.int64) * WIDTH + start + at, as_fp8(values, scale), mask=start + at < WIDTH)


@triton.jit
def round_groups(
    x,  # [rows, WIDTH]
    q,  # [rows, WIDTH] fp8
    scales,  # [WIDTH / 128, rows] fp32
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,  # groups of a program, a power of two
):
    row = tl.program_id(0)
    group = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    values = tl.load(x + row.to(tl.int64) * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 1) / 448.0, 1.0e-12)
    tl.store(scales + group * tl.num_programs(0) + row, scale, mask=group < WIDTH // 128)
    tl.store(q + row.to(tl.int64) * WIDTH + at, as_fp8(values, scale[:, None]), mask=at < WIDTH)
