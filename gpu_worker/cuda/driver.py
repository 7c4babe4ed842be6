"""Loading and launching compiled kernels through the CUDA driver (libcuda), in torch's own context.

A launch packs its arguments into one buffer laid out as C would (`struct` with native alignment), so a launch from
Python costs a few microseconds. Programmatic dependent launch (PDL, CUDA programming guide) is an attribute of it.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Callable, Mapping

from gpu_worker.cuda.compiler import compile_cubin, compilers

_PDL = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_REGISTERS, _LOCAL_BYTES = 4, 3  # CU_FUNC_ATTRIBUTE_NUM_REGS, _LOCAL_SIZE_BYTES
_BUFFER_POINTER, _BUFFER_SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_*
_UINT16, _NOT_INTERLEAVED, _SWIZZLE_128B, _L2_128B, _ZEROS = 1, 0, 3, 2, 0  # CU_TENSOR_MAP_*
DESCRIPTOR = "128siiqq"  # in a signature: what `tensor_map` returns, as the first arguments


class CudaError(RuntimeError):
    """A driver call failed. After a launch failure the context is lost: the process must end."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@functools.cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _cuda().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"CUDA error {code}: {(text.value or b'?').decode()}")


@functools.cache
def tensor_map(address: int, rows: int, columns: int, box: tuple[int, int]) -> tuple[bytes, int, int, int, int]:
    """What TMA wants to know of a matrix of 16-bit elements on the card, without gaps: arguments of a kernel, as Triton takes them.

    box: rows and columns of what is copied at a time; 64 columns at most, which lie in shared memory in the 128-byte swizzle.
    Raises CudaError.
    """
    storage = ctypes.create_string_buffer(128 + 63)
    aligned = -(-ctypes.addressof(storage) // 64) * 64
    code = _cuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        _UINT16,
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(2 * columns),
        (ctypes.c_uint32 * 2)(*reversed(box)),
        (ctypes.c_uint32 * 2)(1, 1),
        _NOT_INTERLEAVED,
        _SWIZZLE_128B,
        _L2_128B,
        _ZEROS,
    )
    _check(code)
    return ctypes.string_at(aligned, 128), rows, columns, columns, 1  # shape and strides, which TMA itself does not need


class Kernel:
    """A kernel: block and cluster size fixed, grid, arguments and stream given at each call. It is loaded by its first launch.

    `signature` is a `struct` format of the arguments: P pointer, i int32, f float, q int64, DESCRIPTOR.
    """

    def __init__(self, module: Module, name: str, signature: str, block: int, cluster: int = 1, shared: int = 0, pdl: bool = True) -> None:
        self.module, self.name = module, name
        self.block, self.shared, self.cluster = block, shared, cluster
        self._pack = struct.Struct("@" + signature)
        self._places = _places(signature) if DESCRIPTOR in signature else []
        self._attributes = (_Attribute * 2)()
        count = 0
        if pdl:
            self._attributes[count].id, self._attributes[count].value[0] = _PDL, 1
            count += 1
        if cluster > 1:
            self._attributes[count].id = _CLUSTER
            self._attributes[count].value[0:3] = [cluster, 1, 1]
            count += 1
        self._config = _Config((1, 1, 1), (block, 1, 1), shared, None, self._attributes, count)
        self._size = ctypes.c_size_t(self._pack.size)

    def __call__(self, stream: int, grid: tuple[int, int], *args: float | bytes) -> None:
        """Launch on `stream` (a handle) with `grid` blocks in x and y. Raises CudaError."""
        buffer = ctypes.create_string_buffer(self._pack.pack(*args), self._pack.size)
        config = self._config
        config.grid[0], config.grid[1] = grid
        config.stream = stream
        address = ctypes.addressof(buffer)
        if self._places:  # a descriptor's place on the device is a multiple of 64, which only the driver knows
            each = (ctypes.c_void_p * len(self._places))(*(address + at for at in self._places))
            _check(_cuda().cuLaunchKernelEx(ctypes.byref(config), self.function, each, None))
            return
        extra = (ctypes.c_void_p * 5)(_BUFFER_POINTER, address, _BUFFER_SIZE, ctypes.addressof(self._size), _END)
        _check(_cuda().cuLaunchKernelEx(ctypes.byref(config), self.function, None, extra))

    @functools.cached_property
    def function(self) -> ctypes.c_void_p:
        """Its handle in the module, which is loaded for it if need be. Raises CudaError."""
        function = ctypes.c_void_p()
        _check(_cuda().cuModuleGetFunction(ctypes.byref(function), self.module.handle, self.name.encode()))
        if self.shared > 48 * 1024:
            _check(_cuda().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, self.shared))
        return function

    @property
    def registers(self) -> int:
        """Registers per thread."""
        return self._attribute(_REGISTERS)

    @property
    def local_bytes(self) -> int:
        """Bytes per thread in local memory; more than 0 means spills."""
        return self._attribute(_LOCAL_BYTES)

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        _check(_cuda().cuFuncGetAttribute(ctypes.byref(value), which, self.function))
        return value.value


def _places(signature: str) -> list[int]:
    """Where each argument begins in the buffer."""
    formats = re.findall(r"\d*[a-zA-Z]", signature)
    return [struct.calcsize("@" + "".join(formats[: i + 1])) - struct.calcsize("@" + format) for i, format in enumerate(formats)]


class Module:
    """Machine code, which may still be compiled, loaded into the current context (torch's) once it is needed."""

    def __init__(self, cubin: Callable[[], bytes]) -> None:
        """cubin: waits for the machine code."""
        self._cubin = cubin

    @functools.cached_property
    def handle(self) -> ctypes.c_void_p:
        """Its handle; the module stays loaded. Raises CompileError, CudaError."""
        handle = ctypes.c_void_p()
        _check(_cuda().cuModuleLoadData(ctypes.byref(handle), self._cubin()))
        return handle

    @classmethod
    def of(cls, source: str, arch: str, macros: Mapping[str, int | str] | None = None) -> Module:
        """A file of `kernels/` with these macros, whose compilation begins."""
        return cls(compilers().submit(compile_cubin, source, arch, macros or {}).result)
