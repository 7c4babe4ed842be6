"""Kernels are compiled side by side, and loaded once they are launched; compiler and driver are played."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest

from gpu_worker.cuda import driver
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
