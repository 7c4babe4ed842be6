"""Linear layers: y = x · Wᵀ + b, and how their weights are kept.

On the CPU two kernels of torch are used because a row's result has the same bits whatever other rows are computed
beside it (measured; `F.linear` in float32 differs for 1, 2, 3 and 5 rows, where MKL turns to matrix-vector code):

* oneDNN's prepacked float32 linear, also the fastest for 1 to 64 rows;
* torch's own 4-bit and 8-bit weight kernels, with bfloat16 activations.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from gpu_worker.loading.source import FourBit

GROUP = 32  # weights that share a scale in FourBitLinear
_AGAIN = 64  # results of a row that are computed again in float32
_AGAIN_ROWS = 16  # rows at a time: the copies of their weights fit a core's cache
_ROWS_HINT = 16  # rows that oneDNN chooses its blocking for; with 1 the result of one row differs from the others
_ONE_ROW = 1024  # columns from which oneDNN sums a single row, and only that, in another order where there is AVX-512


class Linear(Protocol):
    """y = x · Wᵀ + b for x of shape [rows, in]; returns [rows, out], in x's dtype or in that of the linear's kernel."""

    out_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class DenseLinear:
    """Any float dtype, any device; `weight` [out, in] and `bias` [out] are for kernels to take as they are."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features = weight.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class PrepackedLinear:
    """Float32 on the CPU; `weight` [out, in] in oneDNN's blocked layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        self._bias = bias
        self._wide = weight.shape[1] > _ONE_ROW
        self.out_features = weight.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        single = self._wide and len(x) == 1
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.expand(2, -1) if single else x, self.weight, self._bias, "none", [], "")
        return y[:1] if single else y


class FourBitLinear:
    """4-bit weights in groups of 32 on the CPU; bfloat16 activations and results, or float32 results with a bias.

    The kernel computes (q − 8) · scale + zero with bfloat16 scales and zeros, which moves the weights by 0.19%.
    """

    def __init__(self, weights: FourBit, bias: torch.Tensor | None) -> None:
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weights.q.to(torch.int32), 1)
        groups = torch.stack((weights.scale.t(), weights.zero.t()), dim=-1)  # [in / 32, out, 2]
        self._groups = groups.to(torch.bfloat16).contiguous()
        self._bias = bias
        self.out_features = weights.q.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), self._packed, GROUP, self._groups)
        return y if self._bias is None else y + self._bias

    @staticmethod
    def fits(out_features: int, in_features: int) -> bool:
        """Whether torch's kernel takes this shape."""
        return out_features % 16 == 0 and in_features % GROUP == 0


class EightBitRows:
    """int8 weights with one scale a row, on the CPU: an embedding and an output matrix in one.

    The kernel rounds its results to bfloat16, 8 bits, in which the two largest logits are often one number. So the
    largest of each row are computed again, in float32: the choice among them is as fine as the weights.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: float32 [rows, columns]; rounded to 1/127 of each row's largest magnitude."""
        self._scale = (weight.abs().amax(dim=1) / 127).clamp_(min=1e-12).to(torch.bfloat16)
        self._q = torch.round(weight / self._scale.float()[:, None]).clamp_(-127, 127).to(torch.int8)
        self.out_features = weight.shape[0]
        self._again = min(_AGAIN, self.out_features)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (int64 [...]) as float32 [..., columns]."""
        return self._q[ids].float() * self._scale[ids].float().unsqueeze(-1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch._weight_int8pack_mm(x.bfloat16(), self._q, self._scale).float()
        for rows, out in zip(torch.split(x.float(), _AGAIN_ROWS), torch.split(y, _AGAIN_ROWS)):
            largest = out.topk(self._again, sorted=False).indices
            out.scatter_(1, largest, (self.lookup(largest) * rows.unsqueeze(1)).sum(-1))
        return y
