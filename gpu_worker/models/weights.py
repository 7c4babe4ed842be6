"""A model's weights in fused parameters, filled straight from their source."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch

from gpu_worker.layers.fp8 import FP8, Fp8Linear
from gpu_worker.layers.linear import DenseLinear, EightBitRows, FourBitLinear, Linear, PrepackedLinear
from gpu_worker.layers.rope import pairs_side_by_side
from gpu_worker.loading.config import ModelConfig
from gpu_worker.loading.source import FourBit, Fp8, Piece, Shard, TensorSource, layer_pieces, sized_vector, vocabulary_piece

log = logging.getLogger("worker")


@dataclass
class LayerWeights:
    """One decoder layer. Rows of `qkv`: query heads, key heads, value heads; of `gate_up`: gate, then up.

    Within a query or key head, elements that are rotated together are neighbours.
    """

    input_norm: torch.Tensor  # [hidden]
    qkv: Linear
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None
    o: Linear
    post_norm: torch.Tensor  # [hidden]
    gate_up: Linear
    down: Linear


class Embedding(Protocol):
    """Token ids to vectors."""

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 [n]; returns [n, hidden]."""


class DenseEmbedding:
    """A plain table; `weight` [vocab, hidden]."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


@dataclass
class Weights:
    """A whole model, or one rank's shard of it."""

    embedding: Embedding
    layers: list[LayerWeights]
    norm: torch.Tensor  # [hidden]
    head: Linear

    @property
    def fp8_linears(self) -> int:
        """How many linears compute in fp8."""
        return sum(isinstance(linear, Fp8Linear) for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down))


class LinearMaker(Protocol):
    """How linears are kept on a device."""

    def linear(
        self, source: TensorSource, pieces: tuple[Piece, ...], bias: torch.Tensor | None, order: torch.Tensor | None = None
    ) -> Linear:
        """One linear from pieces stacked by rows, which are then put in `order` (int64 [rows]); the bias is in order already."""

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        """A norm's weight or a bias, as the device wants it."""

    def embedding_and_head(self, source: TensorSource, table: Piece, output: Piece | None) -> tuple[Embedding, Linear]:
        """The embedding and the output matrix (None: tied)."""


class DenseMaker:
    """Plain tensors of one dtype on one device; in bfloat16, a layer's linears are fp8 where a checkpoint's are and the device multiplies
    them. A tied head shares the embedding's memory."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._told = False

    def linear(
        self, source: TensorSource, pieces: tuple[Piece, ...], bias: torch.Tensor | None, order: torch.Tensor | None = None
    ) -> Linear:
        fp8 = stack_fp8(source, pieces, self._device)
        if fp8 is not None and self._dtype == torch.bfloat16 and Fp8Linear.fits(fp8, self._device):
            return Fp8Linear(ordered_fp8(fp8, order), bias)
        if fp8 is not None and not self._told:
            self._told = True
            log.warning("torch does not multiply such fp8 weights on this device in %s: they are kept in that", self._dtype)
        return DenseLinear(_ordered(stack_rows(source, pieces, self._device, self._dtype), order), bias)

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self._device, self._dtype)

    def embedding_and_head(self, source: TensorSource, table: Piece, output: Piece | None) -> tuple[Embedding, Linear]:
        weight = stack_rows(source, (table,), self._device, self._dtype)
        head = weight if output is None else stack_rows(source, (output,), self._device, self._dtype)
        return DenseEmbedding(weight), DenseLinear(head)


class CpuMaker:
    """float32 in oneDNN's layout; with `packed`, what a file stores in 4 or 8 bits stays in 4 or 8 bits."""

    def __init__(self, packed: bool) -> None:
        self._packed = packed

    def linear(
        self, source: TensorSource, pieces: tuple[Piece, ...], bias: torch.Tensor | None, order: torch.Tensor | None = None
    ) -> Linear:
        four_bit = self._four_bit(source, pieces, order) if self._packed else None
        if four_bit is not None and FourBitLinear.fits(*four_bit.q.shape):
            return FourBitLinear(four_bit, bias)
        return PrepackedLinear(_ordered(_float32(source, pieces), order), bias)

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        return values.float().contiguous()

    def embedding_and_head(self, source: TensorSource, table: Piece, output: Piece | None) -> tuple[Embedding, Linear]:
        packed = self._packed and source.eight_bit(table)
        weight = _float32(source, (table,))
        if packed and output is None:
            rows = EightBitRows(weight)
            return rows, rows
        embedding = EightBitRows(weight) if packed else DenseEmbedding(weight)
        return embedding, self._head(source, table if output is None else output)

    def _head(self, source: TensorSource, output: Piece) -> Linear:
        weight = _float32(source, (output,))
        if self._packed and source.eight_bit(output):
            return EightBitRows(weight)
        return PrepackedLinear(weight, None)

    def _four_bit(self, source: TensorSource, pieces: tuple[Piece, ...], order: torch.Tensor | None) -> FourBit | None:
        parts = []
        for piece in pieces:
            part = source.four_bit(piece)
            if part is None:
                return None
            parts.append(part)
        return FourBit(*(_ordered(torch.cat([getattr(p, field) for p in parts]), order) for field in ("q", "scale", "zero")))


def stack_rows(source: TensorSource, pieces: tuple[Piece, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The pieces below one another in one tensor of `dtype` on `device`, each copied there once."""
    rows = sum(stop - start for start, stop in (piece.rows for piece in pieces))
    columns = pieces[0].columns[1] - pieces[0].columns[0]
    stacked = torch.empty(rows, columns, device=device, dtype=dtype)
    at = 0
    for piece in pieces:
        count = piece.rows[1] - piece.rows[0]
        stacked[at : at + count].copy_(source.read(piece))
        at += count
    return stacked


def stack_fp8(source: TensorSource, pieces: tuple[Piece, ...], device: torch.device) -> Fp8 | None:
    """The pieces below one another as they are stored, if all are fp8; of several scales for one input the largest, as all share it."""
    parts = [source.fp8(piece) for piece in pieces]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    q, scale = torch.cat([p.q.view(torch.uint8) for p in found]).to(device), torch.cat([p.scale for p in found]).to(device)
    inputs = [p.input_scale for p in found if p.input_scale is not None]
    return Fp8(q.view(FP8), scale, torch.stack(inputs).max().to(device) if inputs else None)


def load_weights(config: ModelConfig, source: TensorSource, maker: LinearMaker, shard: Shard | None = None) -> Weights:
    """Read a model, or the shard of one rank, into fused parameters. Raises LoadError for what is missing.

    The embedding and the output matrix are not split.
    """
    shard = shard or Shard()
    output = None if config.tied_embeddings else vocabulary_piece(config, "lm_head.weight")
    embedding, head = maker.embedding_and_head(source, vocabulary_piece(config, "model.embed_tokens.weight"), output)
    return Weights(
        embedding=embedding,
        layers=[_layer(config, source, maker, shard, i) for i in range(config.layers)],
        norm=maker.vector(sized_vector(source, "model.norm.weight", config.hidden)),
        head=head,
    )


def _layer(config: ModelConfig, source: TensorSource, maker: LinearMaker, shard: Shard, layer: int) -> LayerWeights:
    pieces = layer_pieces(config, layer, shard)
    prefix = f"model.layers.{layer}."

    def vector(name: str) -> torch.Tensor:
        return maker.vector(sized_vector(source, prefix + name, config.hidden))

    def head_vector(name: str) -> torch.Tensor:
        return maker.vector(sized_vector(source, prefix + name, config.head_dim)[pairs_side_by_side(config, 1)])

    queries, keys, values = (piece.rows[1] - piece.rows[0] for piece in pieces.qkv)
    order = torch.cat((pairs_side_by_side(config, (queries + keys) // config.head_dim), torch.arange(values) + queries + keys))
    qkv_bias = None
    if config.qkv_bias:
        parts = [sized_vector(source, p.name.replace(".weight", ".bias"), p.size[0])[slice(*p.rows)] for p in pieces.qkv]
        qkv_bias = maker.vector(torch.cat(parts)[order])
    # a bias behind a sum over ranks must be added once
    o_bias = vector("self_attn.o_proj.bias") if config.o_bias and shard.rank == 0 else None
    return LayerWeights(
        input_norm=vector("input_layernorm.weight"),
        qkv=maker.linear(source, pieces.qkv, qkv_bias, order),
        q_norm=head_vector("self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=head_vector("self_attn.k_norm.weight") if config.qk_norm else None,
        o=maker.linear(source, pieces.o, o_bias),
        post_norm=vector("post_attention_layernorm.weight"),
        gate_up=maker.linear(source, pieces.gate_up, None),
        down=maker.linear(source, pieces.down, None),
    )


def _float32(source: TensorSource, pieces: tuple[Piece, ...]) -> torch.Tensor:
    return stack_rows(source, pieces, torch.device("cpu"), torch.float32)


def ordered_fp8(weights: Fp8, order: torch.Tensor | None) -> Fp8:
    """The rows in this order, int64 [rows]."""
    q = _ordered(weights.q.view(torch.uint8), order).view(FP8)  # torch does not index fp8 everywhere
    return Fp8(q, _ordered(weights.scale, order), weights.input_scale)


def _ordered(rows: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return rows if order is None else rows[order.to(rows.device)]
