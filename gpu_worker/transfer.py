"""Small arrays to a device and back, without a wait on the thread that asks.

CUDA waits for the stream where pageable memory is copied, and does not where it is pinned. Pinned memory comes from torch's caching
allocator, which gives none out again before the copies enqueued with it are made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

_ALIGNED = 8  # bytes
_NUMPY = {torch.int32: np.int32, torch.float32: np.float32}


def upload(device: torch.device, *arrays: Array) -> list[torch.Tensor]:
    """Arrays as tensors of the same shapes and dtypes, in one copy; the arrays may change afterwards."""
    starts = np.cumsum([0, *(-(-a.nbytes // _ALIGNED) * _ALIGNED for a in arrays)]).tolist()
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = host.numpy()
    for at, array in zip(starts, arrays, strict=False):
        view[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    dtypes = [torch.from_numpy(np.empty(0, a.dtype)).dtype for a in arrays]
    return [there[at : at + array.nbytes].view(dtype).view(array.shape) for at, array, dtype in zip(starts, arrays, dtypes, strict=False)]


class Arrival:
    """Tensors on their way to the host, in one copy. All lie on one device and have elements of 4 bytes."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        """Enqueue the copy on the current stream."""
        self._kinds = [(t.shape, _NUMPY[t.dtype]) for t in tensors]
        words = torch.cat([t.contiguous().view(torch.int32).reshape(-1) for t in tensors])
        self._host = torch.empty(words.shape, dtype=torch.int32, pin_memory=words.is_cuda)
        self._host.copy_(words, non_blocking=True)
        self._made = torch.cuda.Event() if words.is_cuda else None  # type: ignore[no-untyped-call]
        if self._made is not None:
            self._made.record()

    def read(self) -> list[Array]:
        """The tensors as arrays; waits until the copy has been made."""
        if self._made is not None:
            self._made.synchronize()
        ends = np.cumsum([shape.numel() for shape, _ in self._kinds])[:-1]
        parts = np.split(self._host.numpy(), ends)
        return [part.view(dtype).reshape(shape) for part, (shape, dtype) in zip(parts, self._kinds, strict=True)]
