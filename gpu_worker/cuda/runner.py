"""The runner on an NVIDIA card. torch and triton are imported by `load`, so that a worker says HELLO before those seconds."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from gpu_worker.cuda.compiler import compilers
from gpu_worker.cuda.kernels_of import begin_kernels
from gpu_worker.errors import LoadError
from gpu_worker.runner import Description, Outcome, Step
from gpu_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from gpu_worker.cuda.engine import Engine

log = logging.getLogger("worker")

NEEDED = "a GPU needs torch with CUDA and triton, which come with the extra pagewire[worker]"


def has_card() -> bool:
    """Whether the driver is there and names a device. Costs no import of torch."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _open_context() -> None:
    """Make the first device's primary context, which torch will find; if that fails, torch says why."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    with suppress(OSError):
        cuda = ctypes.CDLL("libcuda.so.1")
        if cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


class CudaRunner:
    """A Runner (see gpu_worker.runner)."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._engine: Engine | None = None
        self.counter = 0  # steps enqueued and steps finished: it stands still while a step hangs on the card

    def load(self) -> Description:
        if not has_card():
            raise LoadError("no NVIDIA driver with a device is found (libcuda.so.1); --device cpu serves without one")
        if importlib.util.find_spec("triton") is None:
            raise LoadError(f"triton is not installed; {NEEDED}")
        threading.Thread(target=_open_context, name="context", daemon=True).start()  # while torch is imported
        kernels = begin_kernels(self._settings)  # and they are compiled meanwhile
        log.debug("start: kernels begun")
        try:
            try:
                from gpu_worker.cuda.loading import load_engine
            except ImportError as error:
                raise LoadError(f"{error}; {NEEDED}") from error
            log.debug("start: torch imported")
            self._engine, description = load_engine(self._settings, kernels)
        except Exception:
            compilers().stop()
            raise
        return description

    def start(self, step: Step) -> None:
        assert self._engine is not None
        self._engine.start(step)
        self.counter += 1

    def finish(self, step: Step) -> Outcome:
        assert self._engine is not None
        outcome = self._engine.finish()
        self.counter += 1
        return outcome

    def reset(self) -> None:
        assert self._engine is not None
        self._engine.reset()

    def idle(self, interrupted: Callable[[], bool]) -> bool:
        assert self._engine is not None
        return self._engine.idle(interrupted)
