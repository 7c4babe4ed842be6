"""CUDA C++ to machine code through NVRTC, which comes with torch: no nvcc on the user's machine, results cached on disk.

Kernels are compiled side by side, in threads, while whoever asked for them goes on: NVRTC runs without the GIL, and so do Triton's passes
and its assembler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from gpu_worker.errors import LoadError

KERNELS = Path(__file__).parent / "kernels"
Given = ParamSpec("Given")
Made = TypeVar("Made")

log = logging.getLogger("worker")


class CompileError(Exception):
    """NVRTC refused a kernel; the message is its log. Always our own bug."""


class Compilers:
    """Threads that compile."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(thread_name_prefix="compiler")
        self._running: list[Future[object]] = []

    def submit(self, work: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs) -> Future[Made]:
        """Begin to compile something that `wait` waits for."""
        future = self.begin(work, *args, **kwargs)
        self._running.append(future)  # type: ignore[arg-type]
        return future

    def begin(self, work: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs) -> Future[Made]:
        """Begin to compile something that can wait."""
        return self._pool.submit(work, *args, **kwargs)

    def stop(self) -> None:
        """Begin nothing any more, so that a process that ends waits only for what is being compiled; there will be others."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        compilers.cache_clear()

    def wait(self) -> None:
        """Wait until all that has been begun is compiled. Raises what failed."""
        while self._running:
            self._running.pop().result()


@functools.cache
def compilers() -> Compilers:
    """This process's."""
    return Compilers()


def _candidates() -> list[str]:
    """Where libnvrtc may lie: beside the CUDA libraries that torch's wheels bring, else wherever the loader finds it.

    Of several the newest that is no newer than the driver, which loads no machine code of a later CUDA.
    """
    found: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        found += sorted(str(p) for p in Path(root).glob("*/lib/libnvrtc.so.*") if ".alt." not in p.name)
    known, named = cuda_of_driver(), ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    return sorted([*found, *named], key=lambda name: bool(known) and _later(name, known))


def _later(library: str, cuda: int) -> bool:
    version = library.rpartition(".so.")[2]
    return version.isdigit() and int(version) > cuda


def cuda_of_driver() -> int:
    """The newest major version of CUDA that the driver knows; 0 where there is no driver."""
    version = ctypes.c_int()
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    for name in _candidates():
        try:
            for builtins in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")) if "/" in name else ():
                if ".alt." not in builtins.name:
                    ctypes.CDLL(str(builtins))  # found by its soname once it is loaded; no search path names its folder
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise LoadError("libnvrtc was not found: it comes with torch's CUDA wheels (package nvidia-cuda-nvrtc)")


def cache_dir() -> Path:
    """The folder of compiled kernels: $PAGEWIRE_CACHE, else ~/.cache/pagewire."""
    root = os.environ.get("PAGEWIRE_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pagewire")
    return Path(root) / "kernels"


def compile_cubin(source: str, arch: str, defines: Mapping[str, int | str]) -> bytes:
    """Compile `kernels/{source}` for `arch` ("sm_90a") with the macros given; returns the cubin. Raises CompileError.

    The cache key covers everything the result depends on: source, headers beside it, macros, arch, compiler version.
    """
    text = (KERNELS / source).read_text()
    headers = {path.name: path.read_text() for path in sorted(KERNELS.glob("*.cuh"))}
    lib = _nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", *(f"-D{k}={v}" for k, v in sorted(defines.items()))]
    key = hashlib.blake2b(
        "\0".join([text, *headers.values(), *options, f"{major.value}.{minor.value}"]).encode(), digest_size=16
    ).hexdigest()
    path = cache_dir() / f"{source}-{key}.cubin"
    with suppress(OSError):
        if (kept := path.read_bytes()).startswith(b"\x7fELF"):  # a machine that lost its power may have kept a name without content
            return kept
    cubin = _compile(lib, text, headers, source, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            (Path(folder) / path.name).write_bytes(cubin)
            os.replace(Path(folder) / path.name, path)  # whole: a killed process leaves no half file
    except OSError as error:
        say_not_kept(path.parent, error.strerror)
    return cubin


@functools.cache
def say_not_kept(folder: Path, why: str) -> None:
    """Say once that a folder keeps no kernels."""
    log.warning("compiled kernels are not kept in %s (%s): every start compiles them", folder, why)


def _compile(lib: ctypes.CDLL, text: str, headers: Mapping[str, str], source: str, options: list[str]) -> bytes:
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    _check(lib, lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), source.encode(), len(headers), texts, names))
    try:
        args = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        if lib.nvrtcCompileProgram(program, len(options), args):  # ctypes drops the GIL
            size = ctypes.c_size_t()
            lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            lib.nvrtcGetProgramLog(program, log)
            raise CompileError(f"{source} {' '.join(options)}\n{log.value.decode(errors='replace')}")
        size = ctypes.c_size_t()
        _check(lib, lib.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check(lib, lib.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _check(lib: ctypes.CDLL, code: int) -> None:
    if code:
        lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(lib.nvrtcGetErrorString(code).decode())
