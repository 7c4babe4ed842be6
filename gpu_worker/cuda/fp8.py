"""Products with fp8 weights inside a step: a kernel rounds the activations, cuBLAS multiplies. Both can be captured."""

from __future__ import annotations

from functools import partial

import torch

from gpu_worker.cuda.triton_kernel import POINTERS, TritonKernel
from gpu_worker.layers.fp8 import FP8, multiply
from gpu_worker.loading.source import FP8_GROUP, Fp8

_SPAN = 8  # groups of 128 that a program rounds
_ROWS = 4  # cuBLAS reads the scales of so many rows at once


class Fp8Products:
    """For matrices whose inputs have one of these widths, and up to so many tokens."""

    def __init__(self, matrices: list[Fp8], dtype: torch.dtype, tokens: int, device: torch.device) -> None:
        """dtype: of activations. tokens: a multiple of 4."""
        widths = {m.q.shape[1] for m in matrices}
        self._q = torch.zeros(tokens * max(widths, default=0), dtype=torch.uint8, device=device).view(FP8)
        self._scales = torch.zeros(tokens * max((-(-width // FP8_GROUP) for width in widths), default=0), device=device)
        self._kernels = {key: _compile(dtype, *key) for key in {_key(m) for m in matrices}}

    def __call__(self, stream: int, x: torch.Tensor, weights: Fp8, out: torch.Tensor, tokens: int) -> None:
        """out[tokens, n] = x[tokens, k] · Wᵀ; of both as many rows are touched as make a multiple of 4."""
        rows, width, groups = -(-tokens // _ROWS) * _ROWS, weights.q.shape[1], weights.scale.shape[1]
        q, scales = self._q[: rows * width].view(rows, width), self._scales[: rows * groups].view(groups, rows)
        pointers = [t.data_ptr() for t in (x, q, scales)]
        if weights.input_scale is not None:
            pointers.append(weights.input_scale.data_ptr())
        programs = 1 if groups == 1 else -(-groups // _SPAN)
        self._kernels[_key(weights)](stream, (rows, programs), *pointers)
        multiply(q, scales.t(), weights, out[:rows])


def _key(weights: Fp8) -> tuple[int, bool, bool]:
    """What a rounding kernel is compiled for: width, by group, static."""
    return weights.q.shape[1], weights.scale.shape[1] > 1, weights.input_scale is not None


def _compile(dtype: torch.dtype, width: int, by_group: bool, static: bool) -> TritonKernel:
    major, minor = torch.cuda.get_device_capability()
    begin = partial(TritonKernel, capability=10 * major + minor, pdl=False, WIDTH=width)
    arguments = [POINTERS[str(dtype).removeprefix("torch.")], "*fp8e4nv", "*fp32"]
    if by_group:
        return begin("round_fp8.round_groups", arguments, warps=4, SPAN=_SPAN)
    if static:
        return begin("round_fp8.round_rows", [*arguments, "*fp32"], warps=8, BLOCK=2048)
    return begin("round_fp8.round_rows", arguments, warps=8, BLOCK=2048, input_scale=None)
