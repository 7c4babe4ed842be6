"""Where weights come from: named tensors, read in pieces, so that fused and sharded parameters are filled directly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from gpu_worker.errors import LoadError
from gpu_worker.loading.config import ModelConfig
from gpu_worker.loading.quantization import FP8_GROUP as FP8_GROUP


@dataclass(frozen=True)
class Shard:
    """Which part of every linear this process holds: rank of world tensor-parallel ranks."""

    rank: int = 0
    world: int = 1

    def span(self, size: int) -> tuple[int, int]:
        """This rank's [start, stop) of `size` elements, which world must divide."""
        if size % self.world:
            raise ValueError(f"{size} cannot be split over {self.world} ranks")
        each = size // self.world
        return self.rank * each, (self.rank + 1) * each


@dataclass(frozen=True)
class Piece:
    """A part of a two-dimensional tensor, under the name that transformers gives it: a span of rows and of columns.

    size: rows and columns of the whole tensor, 0 where it may have any number that the span fits into.
    """

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    size: tuple[int, int] = (0, 0)

    def fits(self, rows: int, columns: int) -> bool:
        """Whether it can be a part of a tensor of this size."""
        return all(
            stop <= found and wanted in (0, found)
            for (_, stop), wanted, found in zip((self.rows, self.columns), self.size, (rows, columns), strict=True)
        )


@dataclass(frozen=True)
class FourBit:
    """Rows of 4-bit weights in groups of 32: value = (q − 8) · scale + zero.

    q: uint8 [rows, columns], 0 … 15; scale, zero: float32 [rows, columns / 32].
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


@dataclass(frozen=True)
class Fp8:
    """Rows of 8-bit floats: value = q · scale.

    q: float8_e4m3fn [rows, columns]; scale: float32 [rows, 1] or, for each 128 neighbours in a row, [rows, ⌈columns / 128⌉].
    input_scale: float32 scalar by which activations are to be scaled; None: by their own.
    """

    q: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        """Dequantised, float32 [rows, columns]."""
        columns, groups = self.q.shape[1], self.scale.shape[1]
        return self.q.float() * (self.scale if groups == 1 else self.scale.repeat_interleave(FP8_GROUP, 1)[:, :columns])


class TensorSource(Protocol):
    """A model's tensors under transformers' names (`model.layers.0.self_attn.q_proj.weight`)."""

    def has(self, name: str) -> bool:
        """Whether the tensor exists."""

    def vector(self, name: str) -> torch.Tensor:
        """A one-dimensional tensor. Raises LoadError if it is missing."""

    def number(self, name: str) -> float | None:
        """A tensor of one element; None if it is missing. Raises LoadError if it has more."""

    def read(self, piece: Piece) -> torch.Tensor:
        """A piece, dequantised, shape [rows, columns], in any float dtype. Raises LoadError if it is missing or has other sizes."""

    def fp8(self, piece: Piece) -> Fp8 | None:
        """The piece as it is stored, if that is fp8 with scales of rows, or of groups that begin where the piece does; else None."""

    def four_bit(self, piece: Piece) -> FourBit | None:
        """The piece as it is stored, if that is 4 bits in groups of 32; else None."""

    def eight_bit(self, piece: Piece) -> bool:
        """Whether the piece is stored in 8 bits."""


def sized_vector(source: TensorSource, name: str, size: int) -> torch.Tensor:
    """A one-dimensional tensor of `size` elements. Raises LoadError if it is missing or has another size."""
    vector = source.vector(name)
    if vector.shape != (size,):
        raise LoadError(f"{name} has shape {list(vector.shape)}; by the model's sizes it is [{size}]")
    return vector


def vocabulary_piece(config: ModelConfig, name: str) -> Piece:
    """The embedding or the output matrix, which may be stored with more rows than the vocabulary has."""
    return Piece(name, (0, config.vocab_size), (0, config.hidden), (0, config.hidden))


@dataclass(frozen=True)
class LayerPieces:
    """The pieces of one layer's fused linears, in the order in which their rows are stacked."""

    qkv: tuple[Piece, ...]
    o: tuple[Piece, ...]
    gate_up: tuple[Piece, ...]
    down: tuple[Piece, ...]


def layer_pieces(config: ModelConfig, layer: int, shard: Shard) -> LayerPieces:
    """Heads and the MLP's width are split by rows into, and by columns out of, a layer (Megatron-LM, section 3).

    Key/value heads are split too, so the world size must divide their number.
    """
    hidden = config.hidden

    def rows(name: str, size: int) -> Piece:
        return Piece(f"model.layers.{layer}.{name}.weight", shard.span(size), (0, hidden), (size, hidden))

    def columns(name: str, size: int) -> Piece:
        return Piece(f"model.layers.{layer}.{name}.weight", (0, hidden), shard.span(size), (hidden, size))

    return LayerPieces(
        qkv=(
            rows("self_attn.q_proj", config.q_size),
            rows("self_attn.k_proj", config.kv_size),
            rows("self_attn.v_proj", config.kv_size),
        ),
        o=(columns("self_attn.o_proj", config.q_size),),
        gate_up=(rows("mlp.gate_proj", config.intermediate), rows("mlp.up_proj", config.intermediate)),
        down=(columns("mlp.down_proj", config.intermediate),),
    )
