"""The softmax that runs over tiles, alone in a kernel."""

# mypy: ignore-errors
# The body is Triton's language, not Python's.
from __future__ import annotations

import triton
import triton.language as tl

from gpu_worker.cuda.kernels.online_softmax import as_factor, attend


@triton.jit
def tiles(q, k, v, out, kv_scales, TOKENS: tl.constexpr, D: tl.constexpr):
    """out [16, D] fp32 of q [16, D] over k, v [TOKENS, D], whose type is fp8 where kv_scales is not None; 64 tokens at a time."""
    r, d, t = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, 64)
    query = as_factor(tl.load(q + r[:, None] * D + d[None, :]), kv_scales)
    m, total, acc = tl.full([16], -1.0e30, tl.float32), tl.zeros([16], tl.float32), tl.zeros([16, D], tl.float32)
    for start in range(0, TOKENS, 64):
        at = (start + t)[:, None] * D + d[None, :]
        m, total, acc = attend(query, tl.load(k + at), tl.load(v + at), True, m, total, acc, 1.0, False, 0)
    tl.store(out + r[:, None] * D + d[None, :], acc / total[:, None])
