"""What a step needs of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from gpu_worker.attention.interface import Attention


class Decoder(Protocol):
    """A loaded model over paged attention."""

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, attention: Attention, begun: Callable[[], None]
    ) -> torch.Tensor:
        """The final hidden states of some tokens of a step, for `logits`.

        ids, positions: int64 [tokens], rows one after another. last: int64 [n], which tokens are wanted. `attention.begin`
        has been called. begun: called as each layer begins. Returns [n, hidden].
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What follows each of these tokens, float32 [n, vocab]. hidden: [n, hidden] of `forward`."""
