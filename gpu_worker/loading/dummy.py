"""Random weights of a configuration, seeded, made on the device: for speed measurements without files."""

from __future__ import annotations

import hashlib
import zlib

import torch

from gpu_worker.loading.config import DecoderSizes
from gpu_worker.loading.source import FourBit, Fp8, Piece


class DummyTensors:
    """Normally distributed weights, norms of one, no biases beyond zero (a TensorSource).

    A tensor depends on the seed and its name only. The standard deviation, 1 / √columns, keeps activations at their size.
    """

    def __init__(self, config: DecoderSizes, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self._config = config
        self._seed = seed
        self._device = device
        self._dtype = dtype
        self.header_hash = hashlib.blake2b(f"dummy {seed}".encode(), digest_size=16).digest()

    def has(self, name: str) -> bool:
        return True

    def vector(self, name: str) -> torch.Tensor:
        part = name.split(".")[-2]
        if part.endswith("norm") and part not in ("q_norm", "k_norm"):
            return torch.ones(self._config.hidden, device=self._device, dtype=self._dtype)
        if part in ("q_norm", "k_norm"):
            return torch.ones(self._config.head_dim, device=self._device, dtype=self._dtype)
        sizes = {"q_proj": self._config.q_size, "k_proj": self._config.kv_size, "v_proj": self._config.kv_size}
        return torch.zeros(sizes.get(part, self._config.hidden), device=self._device, dtype=self._dtype)

    def number(self, name: str) -> float | None:
        return None

    def read(self, piece: Piece) -> torch.Tensor:
        generator = torch.Generator(self._device)
        generator.manual_seed((self._seed << 32) + zlib.crc32(piece.name.encode()))
        rows, columns = piece.rows[1] - piece.rows[0], piece.columns[1] - piece.columns[0]
        weights = torch.empty(rows, columns, device=self._device, dtype=self._dtype)
        return weights.normal_(0.0, columns**-0.5, generator=generator)

    def fp8(self, piece: Piece) -> Fp8 | None:
        return None

    def four_bit(self, piece: Piece) -> FourBit | None:
        return None

    def eight_bit(self, piece: Piece) -> bool:
        return False
