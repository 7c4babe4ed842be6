"""CUDA graphs of whole steps, one per size, captured when a size is met for the second time.

Eager launches of a step cost the CPU milliseconds, more than the card needs below about 2,000 tokens, so that mixed steps
are captured too: with their rows and tokens rounded up, and the rest computed for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from protocol.messages import Geometry

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, *range(80, 257, 16), *range(320, 1025, 64))  # rows of a decode step
MIXED_ROWS = (1, 8, 64, 256)
MIXED_TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Shape:
    """The size of a captured step."""

    rows: int
    tokens: int  # 0: a decode step
    sampling: bool  # whether the kernel's sampler is part of it


def bucket_of(rows: int, most: int) -> int:
    """The rows that a decode step of `rows` is padded to."""
    return next((b for b in BUCKETS if rows <= b <= most), most)


def mixed_bucket(rows: int, tokens: int, geometry: Geometry) -> tuple[int, int] | None:
    """Rows and tokens that any other step is padded to; None if it is too large to gain by it."""
    fits_rows = next((b for b in MIXED_ROWS if rows <= b <= geometry.slots), None)
    fits_tokens = next((b for b in MIXED_TOKENS if max(tokens, fits_rows or 0) <= b <= geometry.max_step_tokens), None)
    return (fits_rows, fits_tokens) if fits_rows and fits_tokens else None


class Graphs:
    """Captures and replays `body(shape)` on the current stream. The first step of a shape runs eagerly."""

    def __init__(self, body: Callable[[Shape], None], enabled: bool) -> None:
        self._body, self._enabled = body, enabled
        self._met: set[Shape] = set()
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    @property
    def captured(self) -> list[Shape]:
        """The shapes that have a graph."""
        return list(self._graphs)

    def run(self, shape: Shape) -> None:
        """Enqueue a step of this shape."""
        if shape not in self._graphs and shape in self._met and self._enabled:
            self._graphs[shape] = self._capture(shape)
        if shape in self._graphs:
            self._graphs[shape].replay()
        else:
            self._met.add(shape)
            self._body(shape)

    def _capture(self, shape: Shape) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # not torch.cuda.graph(): that synchronises and empties the allocator's caches. thread_local: the output thread waits for events
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self._body(shape)
        finally:
            graph.capture_end()
        return graph
