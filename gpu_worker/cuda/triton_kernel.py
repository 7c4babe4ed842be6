"""Triton and Gluon kernels launched through `driver.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from gpu_worker.cuda.driver import DESCRIPTOR, Kernel, Module


class TritonKernel:
    """A Triton kernel compiled ahead of its first launch and launched like any other.

    That takes a fraction of the Python time of Triton's own launcher (25 µs), needs no C compiler, and never compiles
    between two steps.

    `arguments` are given to the compiler as they will be to the kernel: a dtype for a pointer to it (16-byte aligned), a
    float for a float, a descriptor (the first one only) for what `driver.tensor_map` makes. Everything else is a constant.
    """

    def __init__(
        self, function: triton.JITFunction, arguments: Sequence[object], *, warps: int, pdl: bool, **constants: float | None
    ) -> None:
        """warps: those that begin; a kernel that has others for other work gets them in addition."""
        compiled = function.warmup(*arguments, grid=(1,), num_warps=warps, launch_pdl=pdl, **constants)
        formats = {float: "f", torch.dtype: "P"}
        signature = "".join(formats.get(type(a), DESCRIPTOR) for a in arguments) + "PP"  # Triton adds two scratch pointers, unused here
        told = compiled.metadata
        self._kernel = Kernel(Module(compiled.asm["cubin"]), told.name, signature, 32 * told.num_warps, 1, told.shared, pdl)
        self.registers, self.local_bytes = self._kernel.registers, self._kernel.local_bytes

    def __call__(self, stream: int, grid: tuple[int, int], *args: float | bytes) -> None:
        """Launch on `stream`; pointers as integers. Raises CudaError."""
        self._kernel(stream, grid, *args, 0, 0)
