"""CUDA graphs of the decode step, one per number of rows and kind, captured when one is met for the second time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, *range(80, 257, 16), *range(320, 1025, 64))


def bucket_of(rows: int, most: int) -> int:
    """The rows that a step of `rows` is padded to."""
    return next((b for b in BUCKETS if rows <= b <= most), most)


class Graphs:
    """Captures and replays `body(bucket, sampling)` on the current stream. The first step of a kind runs eagerly."""

    def __init__(self, body: Callable[[int, bool], None], enabled: bool) -> None:
        self._body, self._enabled = body, enabled
        self._met: set[tuple[int, bool]] = set()
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def run(self, bucket: int, sampling: bool) -> None:
        """Enqueue the step; `sampling`: the kernel's sampler is part of it."""
        kind = bucket, sampling
        if kind not in self._graphs and kind in self._met and self._enabled:
            self._graphs[kind] = self._capture(*kind)
        if kind in self._graphs:
            self._graphs[kind].replay()
        else:
            self._met.add(kind)
            self._body(bucket, sampling)

    def _capture(self, bucket: int, sampling: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # not torch.cuda.graph(): that synchronises and empties the allocator's caches. thread_local: the output thread waits for events
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self._body(bucket, sampling)
        finally:
            graph.capture_end()
        return graph
