"""The linears for few tokens against float64."""

from __future__ import annotations

import pytest
import torch

from tests.gpu_worker.cuda.reference import error

if torch.cuda.is_available():
    from gpu_worker.cuda.linears import LinearKernel, cuts, mid_cuts

SHAPES = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (6144, 4096), (4096, 14336), (960, 576), (576, 1536)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("role", ["plain", "norm", "silu", "residual"])
def test_every_cut_of_a_matrix_agrees_with_float64(shape: tuple[int, int], role: str) -> None:
    n, k = shape
    torch.manual_seed(n + k)
    w = (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16()
    bias, stream = torch.randn(n, device="cuda").bfloat16(), torch.cuda.current_stream().cuda_stream
    normed = role in ("norm", "silu")
    few, mid = list(cuts(n, k, normed, 132)), list(mid_cuts(n, k, 132))
    assert few or (normed and k > 8192)
    assert mid or k > 8192
    chosen = [(c, None, (1, 5, 8, 13, 16)) for c in few[:: max(1, len(few) // 5)]]
    chosen += [(None, c, (3, 17, 32, 33, 50, 64)) for c in mid[:: max(1, len(mid) // 5)]]
    for few_cut, mid_cut, counts in chosen:
        roles = {"norm": normed, "silu": role == "silu", "residual": role == "residual", "bias": role != "silu"}
        kernel = LinearKernel(few_cut, mid_cut, "sm_90a", 1e-5, **roles)
        for tokens in counts:
            x = torch.randn(tokens, k, device="cuda").bfloat16() * 3
            res = torch.randn(tokens, n, device="cuda").bfloat16()
            y = torch.full((tokens + 1, n // 2 if role == "silu" else n), float("nan"), device="cuda").bfloat16()
            kernel(stream, w.data_ptr(), x.data_ptr(), res.data_ptr(), bias.data_ptr(), y.data_ptr(), tokens)
            torch.cuda.synchronize()
            d = x.double()
            if normed:
                d = d * torch.rsqrt(d.pow(2).mean(1, keepdim=True) + 1e-5)
            want = d @ w.double().t()
            if role != "silu":
                want = want + bias.double()
            if role == "residual":
                want = want + res.double()
            if role == "silu":
                want = torch.nn.functional.silu(want[:, ::2]) * want[:, 1::2]
            assert error(y[:tokens], want) < 2 * 1.7e-3, (few_cut, mid_cut, tokens)  # 1.7e-3: rounding to bf16 alone
            assert y[tokens].isnan().all(), (few_cut, mid_cut)
