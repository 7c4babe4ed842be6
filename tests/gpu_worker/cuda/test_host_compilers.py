"""Kernels are compiled side by side, and loaded once they are launched; compiler and driver are played."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_worker.cuda import compiler, driver
from gpu_worker.cuda.compiler import CompileError, Compilers
from gpu_worker.cuda.driver import Kernel, Module


def test_compilations_go_on_side_by_side() -> None:
    compilers, together = Compilers(), threading.Barrier(3)
    found = [compilers.submit(together.wait, timeout=10) for _ in range(3)]
    compilers.wait()
    assert sorted(future.result() for future in found) == [0, 1, 2]


def test_what_failed_is_told_to_whoever_waits_for_all() -> None:
    def fail() -> None:
        raise CompileError("no such thing")

    compilers = Compilers()
    compilers.submit(fail)
    compilers.submit(int)
    with pytest.raises(CompileError, match="no such thing"):
        compilers.wait()


@pytest.mark.parametrize(("driver_knows", "first"), [(0, "cu13"), (12, "cuda_nvrtc"), (13, "cu13"), (14, "cu13")])
def test_of_several_compilers_the_driver_must_know_what_it_makes(
    driver_knows: int, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, version in (("cuda_nvrtc", 12), ("cu13", 13)):
        (tmp_path / folder / "lib").mkdir(parents=True)
        (tmp_path / folder / "lib" / f"libnvrtc.so.{version}").touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(compiler, "cuda_of_driver", lambda: driver_knows)
    found = compiler._candidates()
    assert len(found) == 5
    assert Path(found[0]).parts[-3] == first


class Cuda:
    """Notes what the driver is asked for; every call succeeds."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*_: object) -> int:
            self.calls.append(name)
            return 0

        return call


def test_a_kernel_is_loaded_by_its_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, compilers, compiled = Cuda(), Compilers(), threading.Event()

    def compile_cubin(source: str, arch: str, macros: dict[str, int]) -> bytes:
        assert compiled.wait(10)
        return f"{source} {arch} {macros}".encode()

    monkeypatch.setattr(driver, "_cuda", lambda: cuda)
    monkeypatch.setattr(driver, "compile_cubin", compile_cubin)
    monkeypatch.setattr(driver, "compilers", lambda: compilers)
    module = Module.of("a.cu", "sm_90a", {"X": 1})
    one, other = (Kernel(module, name, "Pi", 32, shared=shared) for name, shared in (("one", 0), ("other", 1 << 17)))
    assert not cuda.calls
    compiled.set()
    one(0, (1, 1), 0, 1)
    assert cuda.calls == ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernelEx"]
    one(0, (1, 1), 0, 1)
    other(0, (1, 1), 0, 1)
    assert cuda.calls[3:] == ["cuLaunchKernelEx", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernelEx"]
    assert isinstance(one.function, ctypes.c_void_p)
