"""CUDA graphs of the decode step, one per number of rows, captured when a number is met for the second time."""

from __future__ import annotations

from collections.abc import Callable

import torch

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, *range(80, 257, 16), *range(320, 1025, 64))


def bucket_of(rows: int, most: int) -> int:
    """The rows that a step of `rows` is padded to."""
    return next((b for b in BUCKETS if rows <= b <= most), most)


class Graphs:
    """Captures and replays `body(bucket)` on one stream. The first step of a bucket runs eagerly, which also compiles."""

    def __init__(self, body: Callable[[int], None], enabled: bool) -> None:
        self._body, self._enabled = body, enabled
        self._met: set[int] = set()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: tuple[int, int] | None = None

    def run(self, bucket: int) -> None:
        """Enqueue the step on the current stream."""
        if bucket in self._graphs:
            self._graphs[bucket].replay()
        elif bucket in self._met and self._enabled:
            self._graphs[bucket] = self._capture(bucket)
            self._graphs[bucket].replay()
        else:
            self._met.add(bucket)
            self._body(bucket)

    def _capture(self, bucket: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # not torch.cuda.graph(): that synchronises and empties the allocator's caches. thread_local: the output thread waits for events
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self._body(bucket)
        finally:
            graph.capture_end()
        return graph
