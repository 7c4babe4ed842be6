"""Triton and Gluon kernels launched through `driver.py`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import triton_key

from gpu_worker.cuda.compiler import compilers
from gpu_worker.cuda.driver import DESCRIPTOR, Kernel, Module

_FIRST = threading.Lock()


class TritonKernel:
    """A Triton kernel whose compilation begins ahead of its first launch, and which is launched like any other.

    That takes a fraction of the Python time of Triton's own launcher (25 µs), needs no C compiler, and never compiles
    between two steps.

    `arguments` are given to the compiler as they will be to the kernel: a dtype for a pointer to it (16-byte aligned), a
    float for a float, an int for an int32, a descriptor (the first one only) for what `driver.tensor_map` makes. Everything
    else is a constant.
    """

    def __init__(
        self,
        function: triton.JITFunction,
        arguments: Sequence[object],
        *,
        warps: int,
        pdl: bool,
        waited_for: bool = True,
        **constants: float | None,
    ) -> None:
        """warps: those that begin; a kernel that has others for other work gets them in addition. waited_for: whether a worker is not
        ready before it is compiled."""
        formats = {float: "f", int: "i", torch.dtype: "P"}
        # Triton adds two scratch pointers, unused here
        self._signature = "".join(formats.get(type(a), DESCRIPTOR) for a in arguments) + "PP"
        self._pdl = pdl
        begin = compilers().submit if waited_for else compilers().begin
        self._compiled = begin(_compile, function, arguments, num_warps=warps, launch_pdl=pdl, **constants)

    def compiled(self) -> bool:
        """Whether its compilation has ended, well or not."""
        return self._compiled.done()

    def wait(self) -> None:
        """Until its compilation has ended, well or not."""
        self._compiled.exception()

    def load(self) -> None:
        """Onto the card, which a first launch would do, but which must not happen within a capture. Raises what the compiler raised."""
        self._kernel.function  # noqa: B018

    @functools.cached_property
    def _kernel(self) -> Kernel:
        compiled = self._compiled.result()
        told = compiled.metadata
        cubin: bytes = compiled.asm["cubin"]
        return Kernel(Module(lambda: cubin), told.name, self._signature, 32 * told.num_warps, 1, told.shared, self._pdl)

    @property
    def registers(self) -> int:
        """Registers per thread."""
        return self._kernel.registers

    @property
    def local_bytes(self) -> int:
        """Bytes per thread in local memory; more than 0 means spills."""
        return self._kernel.local_bytes

    def __call__(self, stream: int, grid: tuple[int, int], *args: float | bytes) -> None:
        """Launch on `stream`; pointers as integers. Raises CudaError."""
        self._kernel(stream, grid, *args, 0, 0)


class _Compiling:
    """What Triton asks its driver while it compiles. Its own, which would launch kernels too, is built by a C compiler at first."""

    get_current_device = get_current_stream = staticmethod(lambda *_: 0)

    @staticmethod
    def get_current_target() -> GPUTarget:
        """The card to compile for."""
        major, minor = torch.cuda.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)


def begin_triton() -> None:
    """What must be done before Triton finds or compiles its first kernel; it takes a hash of its own 400 MB."""
    with _FIRST:
        triton.runtime.driver.set_active(_Compiling())
        triton_key()


def _compile(function: triton.JITFunction, arguments: Sequence[object], **options: float | None) -> Any:
    """A Triton kernel's machine code and what is to be known about it; in any thread."""
    begin_triton()
    return function.warmup(*arguments, grid=(1,), **options)
