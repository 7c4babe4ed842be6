"""Every CUDA C++ kernel compiles for Hopper where NVRTC is installed; no card is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_worker.cuda.compiler import CompileError, compile_cubin
from gpu_worker.cuda.linears import MEASURED, MEASURED_MID, Cut, MidCut, best_cut
from gpu_worker.errors import LoadError

LAYERS = [{"NORM": 1, "SILU": 1}, {"NORM": 1, "BIAS": 1}, {"RESIDUAL": 1}]


@pytest.fixture(autouse=True)
def _compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_CACHE", str(tmp_path))
    try:
        compile_cubin("plan.cu", "sm_90a", {})
    except LoadError:
        pytest.skip("needs nvidia-cuda-nvrtc")


@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_plan_elementwise_and_sampler_compile(dtype: int, dim: int) -> None:
    for source in ("elementwise.cu", "sampler.cu"):
        assert compile_cubin(source, "sm_90a", {"DTYPE": dtype, "DIM": dim})


def test_the_filter_compiles() -> None:
    for arch in ("sm_80", "sm_90a"):
        assert compile_cubin("filter.cu", arch, {})


@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_the_write_of_keys_and_values_compiles_for_an_fp8_cache(dtype: int) -> None:
    for arch in ("sm_89", "sm_90a"):
        assert compile_cubin("elementwise.cu", arch, {"DTYPE": dtype, "DIM": 128, "KV8": 1})


@pytest.mark.slow
def test_linears_compile_for_the_measured_shapes() -> None:
    for (n, k, norm), how in MEASURED.items():
        for groups in (1, 2):
            flags = LAYERS[0] if norm else LAYERS[2]
            assert compile_cubin("linear.cu", "sm_90a", Cut(n, k, *how).macros | flags | {"MT": groups})
    for (n, k), how in MEASURED_MID.items():
        for groups in (4, 8):
            assert compile_cubin("linear_mid.cu", "sm_90a", MidCut(n, k, *how).macros | LAYERS[0] | {"MT": groups})


@pytest.mark.slow
@pytest.mark.parametrize("scales", [1, 128])
def test_linears_of_e4m3_weights_compile_for_the_shapes_of_8b(scales: int) -> None:
    for n, k, flags in ((6144, 4096, LAYERS[1]), (4096, 4096, LAYERS[2]), (28672, 4096, LAYERS[0]), (4096, 14336, LAYERS[2])):
        cut = best_cut(n, k, "NORM" in flags, 132, scales)
        assert cut is not None
        for groups in (1, 2):
            assert compile_cubin("linear.cu", "sm_90a", cut.macros | flags | {"MT": groups})


@pytest.mark.parametrize(("repeat", "dim", "kv_heads"), [(2, 128, 8), (4, 128, 8), (3, 64, 3), (1, 64, 12), (4, 256, 4)])
def test_attention_of_few_rows_compiles(repeat: int, dim: int, kv_heads: int) -> None:
    for blocks in (4, 8):
        macros = {"KV_HEADS": kv_heads, "R": repeat, "DIM": dim, "PAGE": 16, "WIDTH": 256, "CL": blocks, "QK_NORM": 1}
        assert compile_cubin("decode_few.cu", "sm_90a", macros)


def test_a_second_compilation_comes_from_the_cache_and_a_bad_macro_is_an_error(tmp_path: Path) -> None:
    first = compile_cubin("sampler.cu", "sm_90a", {"DTYPE": 0})
    cached = list((tmp_path / "kernels").glob("sampler.cu-*.cubin"))
    assert len(cached) == 1
    cached[0].write_bytes(b"from the cache")
    assert compile_cubin("sampler.cu", "sm_90a", {"DTYPE": 0}) == b"from the cache"
    assert first != b"from the cache"
    with pytest.raises(CompileError, match="shape"):
        compile_cubin("linear.cu", "sm_90a", Cut(1000, 100, 1, 2, 1, 8, 1).macros | {"MT": 1})


@pytest.mark.parametrize("pack", [2, 5, 16])
def test_a_work_list_with_groups_of_rows_compiles(pack: int) -> None:
    plain = compile_cubin("plan.cu", "sm_90a", {})
    assert compile_cubin("plan.cu", "sm_90a", {"PACK": 1}) == plain
    assert compile_cubin("plan.cu", "sm_90a", {"PACK": pack}) != plain
    assert compile_cubin("plan.cu", "sm_80", {"PACK": pack})


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100", "sm_120"])
def test_what_every_card_runs_compiles_for_other_generations(arch: str) -> None:
    for source in ("plan.cu", "elementwise.cu", "sampler.cu"):
        assert compile_cubin(source, arch, {"DTYPE": 0, "DIM": 128})
