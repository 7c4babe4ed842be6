"""What sampling takes on a card, counted on tensors without values, beside what the planner says it takes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_worker.cuda.general import General, report
from gpu_worker.cuda.state import DeviceState
from gpu_worker.sampling_memory import sampling_bytes
from gpu_worker.worst_case import worst_step
from protocol.messages import Geometry
from tests.gpu_worker.no_wait import META


class Live(TorchDispatchMode):
    """Bytes of the tensors on `meta` that are alive, and the most of them. What an operation takes inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].device != META and args[1].device == META:
            return args[0]  # there is nothing to be copied
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: object) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class Logits:
    """What `General` asks of a forward pass."""

    def __init__(self, rows: int, vocab_size: int) -> None:
        self.logits = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, device=META)
        self.logits_width = vocab_size

    def wide_logits(self, rows: int) -> torch.Tensor:
        return self.logits[:rows].to(torch.float32, copy=True)

    def logits_behind(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(tokens), self.logits_width, dtype=torch.bfloat16, device=META).float()

    def sample(self, stream: int, outputs: int, wide: torch.Tensor) -> None:
        assert len(wide) == outputs


@pytest.mark.parametrize(("rows", "vocab_size"), [(256, 151936), (1024, 128256), (64, 49152), (4, 128256)])
def test_the_planner_counts_what_sampling_takes_at_most(rows: int, vocab_size: int) -> None:
    geometry = Geometry(16, 1, 0, rows, 4096, 8192, vocab_size)
    state, forward = DeviceState(geometry, META, 33, 64, entries=2, results=2), Logits(rows, vocab_size)
    general, step = General(state, forward), worst_step(geometry)  # type: ignore[arg-type]
    own = forward.logits.nbytes  # a buffer, not a temporary
    with Live() as live:
        general.bind(step)
        report(step, forward)  # type: ignore[arg-type]
        general.sample(step, 0)
    assert 0.5 < (live.peak - own) / sampling_bytes(rows, vocab_size) < 1
