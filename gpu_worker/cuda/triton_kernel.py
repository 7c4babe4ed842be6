"""Triton and Gluon kernels launched through `driver.py`."""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_worker.cuda.compiler import compilers, say_not_kept
from gpu_worker.cuda.driver import DESCRIPTOR, Kernel, Module

POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}  # by torch's names
_FIRST = threading.Lock()
_own: list[tempfile.TemporaryDirectory[str]] = []  # instead of a cache that cannot be written


@dataclass(frozen=True)
class Boxes:
    """The type of a matrix of 16-bit elements that TMA copies in boxes: what `driver.tensor_map` makes."""

    pointer: str  # to elements, as Triton calls it
    box: tuple[int, int]  # rows and columns


Type = str | Boxes


class TritonKernel:
    """A Triton kernel whose compilation begins ahead of its first launch, and which is launched like any other.

    That takes a fraction of the Python time of Triton's own launcher (25 µs), needs no C compiler, and never compiles
    between two steps. Triton is imported by the thread that compiles, and torch by none: `JITFunction.warmup` would.
    """

    def __init__(
        self,
        source: str,
        arguments: Sequence[Type],
        capability: int,
        *,
        warps: int,
        pdl: bool,
        waited_for: bool = True,
        **constants: float | None,
    ) -> None:
        """source: "round_fp8.round_rows", a module of `kernels/` and its function. arguments: their types as Triton calls them, "*bf16"
        (16-byte aligned), "fp32", "i32", or Boxes (the first one only). capability: 90. constants: all other parameters without default.
        warps: those that begin; a kernel that has others for other work gets them in addition. waited_for: whether a worker is not
        ready before it is compiled."""
        formats = {"fp32": "f", "i32": "i"}
        # Triton adds two scratch pointers, unused here
        self._signature = "".join(DESCRIPTOR if isinstance(a, Boxes) else formats.get(a, "P") for a in arguments) + "PP"
        self._pdl = pdl
        begin = compilers().submit if waited_for else compilers().begin
        self._compiled = begin(_compile, source, arguments, capability, constants, {"num_warps": warps, "launch_pdl": pdl})

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
        if told.global_scratch_size or told.profile_scratch_size:
            raise RuntimeError(f"{told.name} wants memory of its launcher, which this one has not")
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


def begin_triton() -> None:
    """What must be done before Triton finds or compiles its first kernel; it takes a hash of its own 400 MB."""
    from triton.runtime.cache import triton_key

    with _FIRST:
        triton_key()


def source_of(source: str, arguments: Sequence[Type], constants: Mapping[str, float | None]) -> Any:
    """What Triton's compiler takes. Raises ImportError, and for a function that this version of Triton does not know whatever it raises."""
    module, _, name = source.partition(".")
    function = getattr(importlib.import_module(f"gpu_worker.cuda.kernels.{module}"), name)
    names = [p.name for p in function.params]
    constants = {p.name: p.default for p in function.params if p.is_constexpr and p.has_default} | dict(constants)
    types = dict(zip((n for n in names if n not in constants), map(_type, arguments), strict=True))
    signature = {n: types.get(n, "constexpr") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    return Source(function, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)


def _type(argument: Type) -> str:
    if isinstance(argument, str):
        return argument
    from triton.experimental.gluon.language import NVMMASharedLayout

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return f"tensordesc<{argument.pointer[1:]}{list(argument.box)},{layout!r}>"


def _compile(
    source: str, arguments: Sequence[Type], capability: int, constants: Mapping[str, float | None], options: Mapping[str, int]
) -> Any:
    """A Triton kernel's machine code and what is to be known about it; in any thread."""
    import triton
    from triton.backends.compiler import GPUTarget

    begin_triton()
    given = source_of(source, arguments, constants)
    target = GPUTarget("cuda", capability, 32)
    try:
        return triton.compile(given, target=target, options=dict(options))
    except OSError as error:
        _keep_elsewhere(error)
        return triton.compile(given, target=target, options=dict(options))


def _keep_elsewhere(error: OSError) -> None:
    """Triton compiles into its cache alone: where that cannot be written, into a folder of this process."""
    with _FIRST:
        if not _own:
            say_not_kept(Path(error.filename or "Triton's cache"), error.strerror)
            _own.append(tempfile.TemporaryDirectory(prefix="pagewire-triton-"))
            os.environ["TRITON_CACHE_DIR"] = _own[0].name
