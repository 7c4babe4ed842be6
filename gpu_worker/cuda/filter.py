"""The kernel that leaves what min-p, top-k and top-p leave, in place of `gpu_worker.sampler.filter_logits`: nothing is sorted."""

from __future__ import annotations

import torch

from gpu_worker.cuda.driver import Kernel
from gpu_worker.sampler import Filters


class FilterKernel:
    """`kernels/filter.cu`, a block for each row with a filter."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __call__(self, logits: torch.Tensor, f: Filters) -> None:
        """Put −∞ in place of the logits (float32 [n, vocab], contiguous) that the filters do not leave; on the current stream."""
        columns = (f.rows, f.temperature, f.log_min_p, f.every_k, f.every_p)
        stream = torch.cuda.current_stream(logits.device).cuda_stream
        self._kernel(stream, (len(f.rows), 1), logits.data_ptr(), logits.shape[1], *(c.data_ptr() for c in columns))
