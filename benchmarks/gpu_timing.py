"""The time of a kernel as a step pays for it: many calls in one CUDA graph, replayed."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def graph_time(launch: Callable[[int], None], nodes: int, stream: torch.cuda.Stream, runs: int = 6) -> float:
    """Microseconds per node of a graph of launch(0) … launch(nodes − 1): the median of so many replays, the first left out."""
    with torch.cuda.stream(stream):
        launch(0)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        for i in range(nodes):
            launch(i)
        graph.capture_end()
        return statistics.median(event_times(graph.replay, runs)[1:]) * 1e3 / nodes


def event_times(work: Callable[[], None], runs: int) -> list[float]:
    """Milliseconds between two events on the current stream around each of so many calls."""
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times
