"""A Hopper card that is not there: kernels are compiled for it by NVRTC and Triton, and each launch succeeds without doing anything.

What torch computes, it computes on the CPU. For programs of their own: modules are patched for good, and whether Triton interprets is
chosen when it is imported.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch

from gpu_worker.cuda import driver

GIB = 1 << 30


class Card:
    """Counts the driver's calls; what is loaded while a graph is captured raises."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.capturing = False
        card = self

        class Event:
            def __init__(self, **_: object) -> None:
                self.awaited = False

            def record(self, *_: object) -> None:
                assert not self.awaited, "recorded again before it was waited for"
                self.awaited = True

            def synchronize(self) -> None:
                self.awaited = False

        class Graph:
            def capture_begin(self, **_: object) -> None:
                card.capturing = True

            def capture_end(self) -> None:
                card.capturing = False

            def replay(self) -> None: ...

        driver._cuda = lambda: card
        stream = SimpleNamespace(cuda_stream=0)
        replaced = {
            "CUDAGraph": Graph,
            "Event": Event,
            "Stream": lambda device: stream,
            "current_stream": lambda device=None: stream,
            "empty_cache": lambda: None,
            "get_device_capability": lambda: (9, 0),
            "get_device_properties": lambda device: SimpleNamespace(major=9, minor=0, multi_processor_count=132),
            "graph_pool_handle": lambda: 0,
            "max_memory_reserved": lambda: GIB,
            "mem_get_info": lambda: (3 * GIB, 4 * GIB),
            "memory_reserved": lambda: GIB // 2,
            "reset_peak_memory_stats": lambda: None,
            "set_stream": lambda stream: None,
            "synchronize": lambda *_: None,
        }
        for name, by in replaced.items():
            setattr(torch.cuda, name, by)

    def __getattr__(self, name: str) -> Any:
        def call(*_: object) -> int:
            self.calls[name] += 1
            assert not (self.capturing and name.startswith("cuModule")), f"{name} within a capture"
            return 0

        return call
