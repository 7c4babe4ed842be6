"""Linears that are rounded to fp8 while weights of 16 or 32 bits are read: for `--quantization fp8`, and random weights of an fp8 model."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpu_worker.layers.fp8 import round_groups, round_rows
from gpu_worker.loading.quantization import ROUNDED, Quantization
from gpu_worker.loading.source import FP8_GROUP, FourBit, Fp8, Piece, TensorSource

INPUT_SCALE = 1 / 16  # of random weights: inputs beyond ±28 are cut


class RoundedToFp8:
    """A TensorSource over another: the linears that are quantised are e4m3; embedding, head, norms and what is left out stay."""

    def __init__(self, source: TensorSource, device: torch.device, quantization: Quantization = ROUNDED) -> None:
        """device: where weights are rounded. quantization: scales are of rows, or of 128 neighbours where its are of blocks."""
        self._source = source
        self._device = device
        self._quantization = quantization

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
        if not self._quantization.covers(piece.name.removesuffix(".weight")):
            return None
        weights = self._source.read(piece).to(self._device)
        if self._quantization.by_block:
            columns = weights.shape[1]
            q, scale = round_groups(F.pad(weights, (0, -columns % FP8_GROUP)))
            return Fp8(q[:, :columns].contiguous(), scale)
        input_scale = torch.tensor(INPUT_SCALE) if self._quantization.static else None
        return Fp8(*round_rows(weights), input_scale)

    def four_bit(self, piece: Piece) -> FourBit | None:
        return None

    def eight_bit(self, piece: Piece) -> bool:
        return False
