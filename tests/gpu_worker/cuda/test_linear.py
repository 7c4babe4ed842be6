"""The linears for few tokens against float64."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.layers import fp8
from gpu_worker.loading.source import Fp8
from tests.gpu_worker.cuda.reference import error

if torch.cuda.is_available():
    from gpu_worker.cuda.linears import Cut, LinearKernel, best_cut, cuts, mid_cuts

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


@pytest.mark.parametrize("shape", [*SHAPES, (28672, 4096)], ids=str)
@pytest.mark.parametrize("role", ["norm", "silu", "residual"])
@pytest.mark.parametrize("scales", [1, 128])
def test_e4m3_weights_agree_with_float64(shape: tuple[int, int], role: str, scales: int) -> None:
    """Inputs are not rounded to e4m3."""
    n, k = shape
    if k % scales:
        pytest.skip("no whole groups")
    torch.manual_seed(n + k)
    w = torch.randn(n, k, device="cuda") * torch.rand(n, 1, device="cuda") * k**-0.5
    weights = Fp8(*(fp8.round_rows(w) if scales == 1 else fp8.round_groups(w)))
    factor, wide, normed = fp8.as_factor(weights), weights.values().double(), role != "residual"
    bias, norm = torch.randn(n, device="cuda").bfloat16(), (1 + torch.randn(k, device="cuda") / 4).bfloat16()
    few, best = list(cuts(n, k, normed, 132, scales)), best_cut(n, k, normed, 132, scales)
    assert best in few
    stream = torch.cuda.current_stream().cuda_stream
    for cut in (best, *few[:: max(1, len(few) // 4)]):
        kernel = LinearKernel(cut, None, "sm_90a", 1e-5, norm=normed, silu=role == "silu", residual=not normed, bias=role != "silu")
        for tokens in (1, 5, 8, 13, 16):
            x = torch.randn(tokens, k, device="cuda").bfloat16() * 3
            res = torch.randn(tokens, n, device="cuda").bfloat16()
            y = torch.full((tokens + 1, n // 2 if role == "silu" else n), float("nan"), device="cuda").bfloat16()
            pointers = [t.data_ptr() for t in (factor.q, x, res, bias, y)]
            kernel(stream, *pointers, tokens, factor.scale.data_ptr(), norm.data_ptr())
            torch.cuda.synchronize()
            d = x.double()
            if normed:
                d = d * torch.rsqrt(d.pow(2).mean(1, keepdim=True) + 1e-5) * norm.double()
            want = d @ wide.t()
            if role == "silu":
                want = torch.nn.functional.silu(want[:, ::2]) * want[:, 1::2]
            else:
                want = want + bias.double()
            if role == "residual":
                want = want + res.double()
            assert error(y[:tokens], want) < (3 if normed else 2) * 1.7e-3, (cut, tokens)  # x times the norm's weight is rounded, too
            assert y[tokens].isnan().all(), cut


@pytest.mark.parametrize("kind", [1, 128])
def test_every_e4m3_number_is_read_exactly(kind: int) -> None:
    """A row is each number in turn at one column, where x is 1. The smallest are bf16 below the normal numbers when they are multiplied."""
    numbers = torch.arange(256, dtype=torch.uint8, device="cuda")
    finite, cut = (numbers & 0x7F) != 0x7F, Cut(256, 128, 1, 2, 1, 4, 1, kind)
    kernel = LinearKernel(cut, None, "sm_90a", 1e-5)
    stream, scale = torch.cuda.current_stream().cuda_stream, torch.ones(256, device="cuda")
    for column in range(4):  # of a word
        q, x = torch.zeros(256, 128, dtype=torch.uint8, device="cuda"), torch.zeros(1, 128, device="cuda").bfloat16()
        q[:, column] = torch.where(finite, numbers, 0)
        x[0, column] = 1.0
        y = torch.zeros(1, 256, device="cuda").bfloat16()
        kernel(stream, q.data_ptr(), x.data_ptr(), 0, 0, y.data_ptr(), 1, scale.data_ptr())
        torch.cuda.synchronize()
        assert torch.equal(y[0].float(), q[:, column].view(fp8.FP8).float())
