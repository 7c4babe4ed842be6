"""A checkpoint in 16 or 32 bits whose linears are rounded to fp8 while it is read (`--quantization fp8`)."""

from __future__ import annotations

import torch

from gpu_worker.layers.fp8 import round_rows
from gpu_worker.loading.quantization import Quantization
from gpu_worker.loading.source import FourBit, Fp8, Piece, TensorSource

ROUNDED = Quantization("weight_scale", by_block=False, static=False, left_out=("model.embed_tokens", "lm_head"))


class RoundedToFp8:
    """A TensorSource over another: every linear of a layer is e4m3 with one scale a row; embedding, head and norms stay."""

    def __init__(self, source: TensorSource, device: torch.device) -> None:
        """device: where weights are rounded."""
        self._source = source
        self._device = device

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def vector(self, name: str) -> torch.Tensor:
        return self._source.vector(name)

    def number(self, name: str) -> float | None:
        return self._source.number(name)

    def read(self, piece: Piece) -> torch.Tensor:
        fp8 = self.fp8(piece)
        return self._source.read(piece) if fp8 is None else fp8.values()

    def fp8(self, piece: Piece) -> Fp8 | None:
        return Fp8(*round_rows(self._source.read(piece).to(self._device))) if piece.name.startswith("model.layers.") else None

    def four_bit(self, piece: Piece) -> FourBit | None:
        return None

    def eight_bit(self, piece: Piece) -> bool:
        return False
