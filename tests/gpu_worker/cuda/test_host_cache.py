"""A cache of kernels that cannot be read or written costs time, and nothing else; NVRTC and Triton are played."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_worker.cuda import compiler, triton_kernel

CODE = b"\x7fELF code"


class Nvrtc:
    """Counts what it compiles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.compiled = 0
        monkeypatch.setenv("PAGEWIRE_CACHE", str(cache))
        monkeypatch.setattr(compiler, "_nvrtc", lambda: SimpleNamespace(nvrtcVersion=lambda *_: 0))
        monkeypatch.setattr(compiler, "_compile", self.compile)
        compiler.say_not_kept.cache_clear()

    def compile(self, *_: object) -> bytes:
        self.compiled += 1
        return CODE


def test_machine_code_is_kept_whole_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc = Nvrtc(monkeypatch, tmp_path)
    for _ in range(2):
        assert compiler.compile_cubin("plan.cu", "sm_90a", {}) == CODE
    assert nvrtc.compiled == 1
    (kept,) = (tmp_path / "kernels").iterdir()
    kept.write_bytes(b"")
    assert compiler.compile_cubin("plan.cu", "sm_90a", {}) == CODE
    assert kept.read_bytes() == CODE


@pytest.mark.parametrize("beside", ["a file", "a folder"])
def test_code_that_cannot_be_kept_is_compiled_again(
    beside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if beside == "a file":
        cache = tmp_path / "cache"
        cache.write_text("where a folder should be")
    else:
        cache = Path("/proc/1/pagewire")  # nobody may, root included
    nvrtc = Nvrtc(monkeypatch, cache)
    for source in ("plan.cu", "plan.cu", "sampler.cu"):
        assert compiler.compile_cubin(source, "sm_90a", {}) == CODE
    assert nvrtc.compiled == 3
    (told,) = caplog.messages
    assert str(cache) in told


def test_triton_compiles_into_a_folder_of_its_own_where_its_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    cache.write_text("where a folder should be")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(triton_kernel, "_own", own := [])
    monkeypatch.setattr(triton_kernel, "begin_triton", lambda: None)
    monkeypatch.setattr(triton_kernel, "source_of", lambda *given: given)
    compiler.say_not_kept.cache_clear()

    def compile(given: object, **_: object) -> Any:
        folder = Path(os.environ["TRITON_CACHE_DIR"], "key")
        os.makedirs(folder, exist_ok=True)
        return folder

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(compile=compile))
    monkeypatch.setitem(sys.modules, "triton.backends", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "triton.backends.compiler", SimpleNamespace(GPUTarget=lambda *_: None))
    with ThreadPoolExecutor() as pool:
        kept = [pool.submit(triton_kernel._compile, "decode_attention.decode_attention", [], 90, {}, {}) for _ in range(8)]
    assert len({future.result() for future in kept}) == 1
    assert Path(own[0].name) in kept[0].result().parents
    assert len(caplog.messages) == 1
    assert str(cache) in caplog.messages[0]


def test_a_kernel_that_wants_memory_of_its_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace(name="attend", global_scratch_size=64, profile_scratch_size=0, num_warps=4, shared=0)
    compilers = SimpleNamespace(submit=lambda *_: SimpleNamespace(result=lambda: SimpleNamespace(metadata=told, asm={"cubin": CODE})))
    monkeypatch.setattr(triton_kernel, "compilers", lambda: compilers)
    kernel = triton_kernel.TritonKernel("decode_attention.decode_attention", [], 90, warps=4, pdl=False)
    with pytest.raises(RuntimeError, match="attend wants memory"):
        kernel.load()
