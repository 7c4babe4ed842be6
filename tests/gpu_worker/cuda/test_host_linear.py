"""kernels/linear.cu, run on the CPU by host_block.h, multiplies by bf16 and by e4m3 weights as float64 does."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gpu_worker.cuda.compiler import KERNELS
from gpu_worker.cuda.linears import Cut
from gpu_worker.layers import fp8
from gpu_worker.layers.fp8 import as_factor
from gpu_worker.loading.source import Fp8
from tests.gpu_worker.cuda.host_compiler import compiler
from tests.gpu_worker.cuda.reference import error

HERE = Path(__file__).parent
EPS = 1e-5
ROLES = {"norm": {"NORM": 1, "BIAS": 1}, "silu": {"NORM": 1, "SILU": 1}, "residual": {"RESIDUAL": 1, "BIAS": 1}}
_folder = tempfile.TemporaryDirectory(prefix="pagewire-linear-")


@functools.cache
def _function(cut: Cut, role: str, token_groups: int) -> ctypes._NamedFuncPointer:
    """The function of host_linear.cpp for one cut. Skips the test where there is no C++ compiler."""
    folder = Path(tempfile.mkdtemp(dir=_folder.name))
    source, shared = (KERNELS / "linear.cu").read_text(), "extern __shared__ __align__(16) float shared[];"
    assert shared in source
    (folder / "linear_on_host.cu").write_text(source.replace(shared, "float* shared = shared_memory();"))
    macros = [f"-D{k}={v}" for k, v in (cut.macros | ROLES[role] | {"MT": token_groups}).items()]
    command = [compiler(), "-O1", "-w", "-shared", "-fPIC", "-std=c++17", f"-I{folder}", f"-I{KERNELS}", *macros]
    library = folder / "linear.so"
    subprocess.run([*command, "-o", str(library), str(HERE / "host_linear.cpp")], check=True, timeout=120)
    function = ctypes.CDLL(str(library)).host_linear
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_uint, *[pointer] * 5, ctypes.c_int, ctypes.c_float, pointer, pointer]
    function.restype = ctypes.c_bool
    return function


def _weights(n: int, k: int, kind: int) -> torch.Tensor | Fp8:
    w = torch.randn(n, k) * torch.rand(n, 1) * k**-0.5
    w[:, ::5] *= 1e-4  # e4m3 has some of them below its normal numbers
    if kind == 0:
        return w.bfloat16()
    return as_factor(Fp8(*(fp8.round_rows(w) if kind == 1 else fp8.round_groups(w))))


def _check(cut: Cut, role: str, tokens: int, size: float = 1.0) -> None:
    torch.manual_seed(cut.n + cut.k + tokens)
    weights, silu, residual = _weights(cut.n, cut.k, cut.fp8), role == "silu", role == "residual"
    x, norm = (torch.randn(tokens, cut.k) * size).bfloat16(), (1 + torch.randn(cut.k) / 4).bfloat16()
    res, bias = torch.randn(tokens, cut.n).bfloat16(), torch.randn(cut.n).bfloat16()
    y = torch.full((tokens + 1, cut.n // 2 if silu else cut.n), float("nan")).bfloat16()
    if isinstance(weights, Fp8):
        q, scale, wide = weights.q, weights.scale.data_ptr(), weights.values()
    else:
        q, scale, wide = weights, 0, weights
    pointers = [t.data_ptr() for t in (q, x, res, bias, y)]
    assert _function(cut, role, -(-tokens // 8))(7, *pointers, tokens, EPS, scale, norm.data_ptr()), "threads wait for ever"
    want = x.double()
    if not residual:
        want = want * torch.rsqrt(want.square().mean(1, keepdim=True) + EPS)
        if cut.fp8:
            want = want * norm.double()
    want = want @ wide.double().t()
    if silu:
        want = F.silu(want[:, ::2]) * want[:, 1::2]
    else:
        want = want + bias.double()
    if residual:
        want = want + res.double()
    bound = 3 if cut.fp8 and not residual else 2  # x times the norm's weight is rounded, too
    assert error(y[:tokens], want) < bound * 1.7e-3, (cut, role, tokens)  # 1.7e-3: rounding to bf16 alone
    assert y[tokens].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1, 128])
@pytest.mark.parametrize("role", list(ROLES))
def test_a_linear_agrees_with_float64(kind: int, role: str) -> None:
    for tokens in (1, 8, 11, 16):
        _check(Cut(96, 512, 1, 4, 1, 2, 1, kind), role, tokens)  # a walk of three tiles
        if role == "residual":
            _check(Cut(64, 512, 2, 2, 2, 1, 1, kind), role, tokens)  # a cluster of two blocks


@pytest.mark.slow
@pytest.mark.parametrize("cut", [Cut(64, 1024, 1, 2, 1, 4, 1), Cut(48, 768, 3, 4, 1, 1, 1), Cut(32, 384, 2, 6, 1, 1, 1)], ids=str)
def test_any_cut_of_e4m3_agrees_with_float64(cut: Cut) -> None:
    """One tile a block; scales that begin within a warp's columns, and warps that share them."""
    for kind in (1, 128):
        for role in ("silu", "residual"):
            _check(replace(cut, fp8=kind), role, 5)


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_inputs_of_any_size_are_multiplied_alike(size: float) -> None:
    _check(Cut(96, 512, 1, 4, 1, 2, 1, 1), "residual", 3, size)


@pytest.mark.parametrize("kind", [1, 128])
def test_every_e4m3_number_is_read_exactly(kind: int) -> None:
    """A row is each number in turn at column 0, all others zeros; x is 1 there."""
    numbers = torch.arange(256, dtype=torch.uint8)
    finite = (numbers & 0x7F) != 0x7F
    q = torch.zeros(256, 128, dtype=torch.uint8)
    for column in range(4):  # of a word
        q.zero_()
        q[:, column] = torch.where(finite, numbers, 0)
        x = torch.zeros(1, 128).bfloat16()
        x[0, column] = 1.0
        y, zeros = torch.zeros(1, 256).bfloat16(), torch.zeros(256).bfloat16()
        cut, scale = Cut(256, 128, 1, 2, 1, 4, 1, kind), torch.ones(256)
        pointers = [t.data_ptr() for t in (q, x, zeros, zeros, y)]
        assert _function(cut, "residual", 1)(1, *pointers, 1, EPS, scale.data_ptr(), 0)
        assert torch.equal(y[0].float(), q[:, column].view(fp8.FP8).float())


def test_the_order_of_threads_changes_nothing() -> None:
    cut = Cut(64, 512, 2, 2, 2, 1, 1, 1)
    weights = _weights(64, 512, 1)
    assert isinstance(weights, Fp8)
    x, zeros = torch.randn(5, 512).bfloat16(), torch.zeros(5 * 64).bfloat16()
    found = []
    for seed in range(4):
        y = torch.zeros(5, 64).bfloat16()
        pointers = [t.data_ptr() for t in (weights.q, x, zeros, zeros, y)]
        assert _function(cut, "residual", 1)(seed, *pointers, 5, EPS, weights.scale.data_ptr(), 0)
        found.append(y)
    assert all(torch.equal(y, found[0]) for y in found)
