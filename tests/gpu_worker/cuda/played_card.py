"""A Hopper card that is not there: kernels are compiled for it by NVRTC and Triton, and each launch succeeds without doing anything.

Streams do not wait for one another, as an engine's does not for the default one: a launch on another than torch's current one raises.

What torch computes, it computes on the CPU. For programs of their own: modules are patched for good, and whether Triton interprets is
chosen when it is imported.
"""

from __future__ import annotations

from collections import Counter
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch

from gpu_worker.cuda import driver

GIB = 1 << 30


class Card:
    """Counts the driver's calls; what is loaded, recorded or waited for while a graph is captured raises."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.capturing = False
        self.stream = SimpleNamespace(cuda_stream=0)  # torch's current one
        card = self

        class Event:
            def __init__(self, **_: object) -> None:
                self.awaited = False

            def record(self, stream: object = None) -> None:
                assert not self.awaited, "recorded again before it was waited for"
                assert not card.capturing, "recorded within a capture"
                assert stream in (None, card.stream), "recorded on another stream"
                self.awaited = True

            def synchronize(self) -> None:
                assert not card.capturing, "waited for within a capture"
                self.awaited = False

        class Graph:
            def capture_begin(self, **_: object) -> None:
                assert card.stream.cuda_stream, "torch captures no default stream"
                card.capturing = True

            def capture_end(self) -> None:
                card.capturing = False

            def replay(self) -> None: ...

        driver._cuda = lambda: card
        streams = count(1)
        replaced = {
            "CUDAGraph": Graph,
            "Event": Event,
            "Stream": lambda device: SimpleNamespace(cuda_stream=next(streams)),
            "current_stream": lambda device=None: card.stream,
            "empty_cache": lambda: None,
            "get_device_capability": lambda: (9, 0),
            "get_device_properties": lambda device: SimpleNamespace(major=9, minor=0, multi_processor_count=132),
            "graph_pool_handle": lambda: 0,
            "max_memory_reserved": lambda: GIB,
            "mem_get_info": lambda: (3 * GIB, 4 * GIB),
            "memory_reserved": lambda: GIB // 2,
            "reset_peak_memory_stats": lambda: None,
            "set_stream": lambda stream: setattr(card, "stream", stream),
            "synchronize": lambda *_: None,
        }
        for name, by in replaced.items():
            setattr(torch.cuda, name, by)

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> int:
            self.calls[name] += 1
            if name == "cuLaunchKernelEx":
                assert (given[0]._obj.stream or 0) == self.stream.cuda_stream, "launched on another stream"
            assert not (self.capturing and name.startswith("cuModule")), f"{name} within a capture"
            return 0

        return call
