"""Numbers of 8 bits (e4m3: Micikevicius et al. 2022) with scales, and linears that multiply them: W8A8.

Weights have a scale for each row, or one for each 128 neighbours in a row; activations are rounded to e4m3 before the
product, with scales of the same kind. The product is cuBLAS's, through `torch._scaled_mm`, summed in float32.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from gpu_worker.loading.source import FP8_GROUP, Fp8

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0  # e4m3's largest number
_LEAST = 1e-12  # scale of nothing but zeros


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """x, float of any shape, in e4m3; what is too large becomes ±448, NaN stays NaN."""
    return x.clamp(-FP8_MOST, FP8_MOST).to(FP8)


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x: float [rows, columns]. Returns e4m3 of its shape and scales, float32 [rows, 1]."""
    wide = x.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / FP8_MOST).clamp_(min=_LEAST)
    return to_fp8(wide / scale), scale


def round_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x: float [rows, columns], columns a multiple of 128. Returns e4m3 of its shape and scales, float32 [rows, columns / 128]."""
    q, scale = round_rows(x.reshape(-1, FP8_GROUP))
    return q.view(x.shape), scale.view(x.shape[0], -1)


def multiply(q: torch.Tensor, scale: torch.Tensor, weights: Fp8, out: torch.Tensor | None = None) -> torch.Tensor:
    """(q · scale) · Wᵀ, bfloat16 [rows, n].

    q: e4m3 [rows, k]; scale: float32, [rows, 1] or, of groups, [rows, k / 128] with rows side by side. Weights as `as_factor` gives them.
    """
    y: torch.Tensor = torch._scaled_mm(q, weights.q.t(), scale, weights.scale.t(), out_dtype=torch.bfloat16, out=out)
    return y


def as_factor(weights: Fp8) -> Fp8:
    """The same weights as cuBLAS wants them: scales of rows side by side."""
    return replace(weights, q=weights.q.contiguous(), scale=weights.scale.t().contiguous().t())


class Fp8Linear:
    """y = x · Wᵀ + b with both factors in e4m3; results in bfloat16. On a card for which `fits` is true; rows also on the CPU."""

    def __init__(self, weights: Fp8, bias: torch.Tensor | None) -> None:
        self._weights = as_factor(weights)
        self._bias = bias
        self.out_features = weights.q.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        input_scale = self._weights.input_scale
        if self._weights.scale.shape[1] > 1:
            q, scale = round_groups(F.pad(x, (0, 0, 0, -rows % 4)))  # scales of four rows are read at once
            scale = scale.t().contiguous().t()
        elif input_scale is not None:
            q, scale = to_fp8(x.float() / input_scale), input_scale.expand(rows, 1).contiguous()
        else:
            q, scale = round_rows(x)
        y = multiply(q, scale, self._weights)[:rows]
        return y if self._bias is None else y + self._bias

    @staticmethod
    def fits(weights: Fp8, device: torch.device) -> bool:
        """Whether torch multiplies such weights there: rows from compute capability 8.9 on, groups on 9.x with CUDA 12.9 or later.

        On 8.9 it takes torch 2.12: before, the product was launched on another stream than the current one (pytorch issue 177651).
        """
        if device.type != "cuda" or any(size % 16 for size in weights.q.shape):
            return False
        capability = torch.cuda.get_device_capability(device)
        if weights.scale.shape[1] == 1:
            return capability >= ((8, 9) if _release(torch.__version__) >= (2, 12) else (9, 0))
        return capability[0] == 9 and _release(torch.version.cuda or "0.0") >= (12, 9) and weights.q.shape[1] % FP8_GROUP == 0


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2])
