"""CUDA graphs of whole steps, one per size, captured when a size is met for the second time, or before, while nothing runs.

Eager launches of a step cost the CPU milliseconds, more than the card needs below about 2,000 tokens, so that mixed steps
are captured too: with their rows and tokens rounded up, and the rest computed for nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from protocol.messages import Geometry

if TYPE_CHECKING:
    from gpu_worker.cuda.forward import Layers  # needs triton

BUCKETS: tuple[int, ...] = (1, 2, 4, 8, 16, 24, 32, 48, 64, *range(80, 257, 16), *range(320, 1025, 64))  # rows of a decode step
MIXED_ROWS = (1, 8, 64, 256)
MIXED_TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024)


class Shape(NamedTuple):
    """The size of a captured step."""

    rows: int
    tokens: int  # 0: a decode step
    sampling: bool  # whether the kernel's sampler is part of it


def bucket_of(rows: int, most: int) -> int:
    """The rows that a decode step of `rows` is padded to."""
    return min(BUCKETS[bisect_left(BUCKETS, rows)], most)


def mixed_bucket(rows: int, tokens: int, geometry: Geometry) -> tuple[int, int] | None:
    """Rows and tokens that any other step is padded to; None if it is too large to gain by it."""
    fits_rows = next((b for b in MIXED_ROWS if rows <= b <= geometry.slots), None)
    fits_tokens = next((b for b in MIXED_TOKENS if max(tokens, fits_rows or 0) <= b <= geometry.max_step_tokens), None)
    return (fits_rows, fits_tokens) if fits_rows and fits_tokens else None


def likely_shapes(geometry: Geometry) -> list[Shape]:
    """The sizes that an ordinary load meets, small ones first: those of greedy and plainly sampled tokens."""
    decode = {bucket_of(rows, geometry.slots) for rows in range(1, geometry.slots + 1)}
    mixed = {mixed_bucket(rows, tokens, geometry) for rows in MIXED_ROWS for tokens in MIXED_TOKENS if rows <= tokens}
    shapes = [Shape(rows, 0, True) for rows in decode] + [Shape(*sizes, True) for sizes in mixed if sizes]
    return sorted(shapes, key=lambda shape: (max(shape.rows, shape.tokens), shape.rows, shape.tokens))


class _Interrupted(Exception):
    """A capture is given up: there is something to do."""


class Graphs:
    """Captures and replays `body(shape, layers)` on the current stream; layers: those to launch, None for all. `samples` are layers that
    load what all need; by default the first.

    The first step of a shape runs eagerly, so that what it needs is loaded before a capture, in which nothing may be.
    """

    def __init__(self, body: Callable[[Shape, Layers | None], None], layers: Layers, enabled: bool, samples: Layers | None = None) -> None:
        self._body, self._layers, self._enabled = body, layers, enabled
        self._samples = list(islice(layers, 1)) if samples is None else samples
        self._met: set[Shape] = set()
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    @property
    def captured(self) -> list[Shape]:
        """The shapes that have a graph."""
        return list(self._graphs)

    def run(self, shape: Shape) -> None:
        """Enqueue a step of this shape."""
        graph = self._graphs.get(shape)
        if graph is None and self._enabled and shape in self._met:
            graph = self._graphs[shape] = self._capture(shape, None)
        if graph is not None:
            graph.replay()
        else:
            self._met.add(shape)
            self._body(shape, None)

    def missing(self, shapes: list[Shape]) -> Shape | None:
        """The first of these that has no graph and could have one."""
        return next((shape for shape in shapes if shape not in self._graphs), None) if self._enabled else None

    def met(self, shape: Shape) -> bool:
        """Whether what a shape needs is loaded."""
        return shape in self._met

    def warm_up(self, shape: Shape) -> None:
        """Load what a shape needs. Consumes a step's inputs, as `run` does."""
        self._body(shape, self._samples)
        self._met.add(shape)

    def capture(self, shape: Shape, interrupted: Callable[[], bool]) -> None:
        """Capture a shape that has been met, unless `interrupted()` becomes true, which is asked before each layer."""

        def layers() -> Iterator[Any]:
            for layer in self._layers:
                if interrupted():
                    raise _Interrupted
                yield layer

        with suppress(_Interrupted):
            self._graphs[shape] = self._capture(shape, layers())

    def _capture(self, shape: Shape, layers: Layers | None) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # not torch.cuda.graph(): that synchronises and empties the allocator's caches. thread_local: the output thread waits for events
        if not self._graphs:  # torch takes no pool again whose graphs have all been given up
            self._pool = torch.cuda.graph_pool_handle()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self._body(shape, layers)
        finally:
            graph.capture_end()
        return graph
