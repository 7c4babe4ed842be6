"""A model's weights as the kernels want them, read from any TensorSource straight onto the card.

Two liberties are taken with a checkpoint, both exact in real numbers and rounded once: the weight of the norm before a
linear is multiplied into the linear's columns (so the kernel scales by 1 / rms alone, after its sum), and the rows of gate
and up alternate (so one kernel sees both of a pair). The final norm stays apart: embeddings may be tied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_worker.layers.fp8 import Fp8Linear, as_factor
from gpu_worker.loading.config import ModelConfig
from gpu_worker.loading.source import Fp8, Piece, Shard, TensorSource, layer_pieces, sized_vector, vocabulary_piece
from gpu_worker.models.weights import ordered_fp8, stack_fp8, stack_rows

Matrix = torch.Tensor | Fp8  # fp8 where the checkpoint has it and the card multiplies it; such columns hold no norm's weight


@dataclass(frozen=True)
class LayerWeights:
    """One layer; H hidden, Q query width, V key (and value) width, I intermediate width, D head dimension."""

    input_norm: torch.Tensor  # [H]
    qkv: Matrix  # [Q + 2 V, H], the input norm's weight in its columns
    qkv_bias: torch.Tensor | None  # [Q + 2 V]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    o: Matrix  # [H, Q]
    o_bias: torch.Tensor | None  # [H]
    post_norm: torch.Tensor  # [H]
    gate_up: Matrix  # [2 I, H], rows gate 0, up 0, gate 1, …, the post-attention norm's weight in its columns
    down: Matrix  # [H, I]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All of them, in the order of their products."""
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class ModelWeights:
    """All of a model."""

    embedding: torch.Tensor  # [vocab, H]
    head: torch.Tensor  # [vocab, H]; the embedding where they are tied
    final_norm: torch.Tensor  # [H]
    layers: list[LayerWeights]

    @property
    def fp8_linears(self) -> int:
        """How many linears compute in fp8."""
        return sum(isinstance(matrix, Fp8) for layer in self.layers for matrix in layer.matrices)


@dataclass(frozen=True)
class UnreadWeights:
    """Weights that are still to be read: what is compiled for them needs their shapes and type only."""

    source: TensorSource
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    shard: Shard

    def read(self) -> ModelWeights:
        """Read everything. Raises LoadError for a missing or wrongly sized tensor."""
        return load_weights(self.source, self.config, self.device, self.dtype, self.shard)


def load_weights(source: TensorSource, config: ModelConfig, device: torch.device, dtype: torch.dtype, shard: Shard) -> ModelWeights:
    """Read everything. Raises LoadError for a missing or wrongly sized tensor."""
    embedding = stack_rows(source, (vocabulary_piece(config, "model.embed_tokens.weight"),), device, dtype)
    head = embedding if config.tied_embeddings else stack_rows(source, (vocabulary_piece(config, "lm_head.weight"),), device, dtype)
    final_norm = sized_vector(source, "model.norm.weight", config.hidden).to(device, dtype)
    return ModelWeights(embedding, head, final_norm, [_layer(source, config, i, shard, device, dtype) for i in range(config.layers)])


def _layer(source: TensorSource, config: ModelConfig, index: int, shard: Shard, device: torch.device, dtype: torch.dtype) -> LayerWeights:
    pieces = layer_pieces(config, index, shard)
    prefix = f"model.layers.{index}."

    def vector(name: str, size: int = config.hidden) -> torch.Tensor:
        return sized_vector(source, prefix + name, size).to(device, dtype)

    def matrix(pieces: tuple[Piece, ...], norm: torch.Tensor | None = None, order: torch.Tensor | None = None) -> Matrix:
        fp8 = stack_fp8(source, pieces, device)
        if fp8 is not None and dtype == torch.bfloat16 and Fp8Linear.fits(fp8, device):
            return as_factor(ordered_fp8(fp8, order))
        weight = stack_rows(source, pieces, device, dtype)
        if order is not None:
            weight = weight[order.to(device)]
        return weight if norm is None else _fold(weight, norm)

    alternating = torch.arange(2 * (pieces.gate_up[0].rows[1] - pieces.gate_up[0].rows[0])).view(2, -1).t().reshape(-1)
    input_norm, post_norm = vector("input_layernorm.weight"), vector("post_attention_layernorm.weight")
    bias = None
    if config.qkv_bias:
        parts = [sized_vector(source, p.name.replace(".weight", ".bias"), p.size[0])[slice(*p.rows)] for p in pieces.qkv]
        bias = torch.cat(parts).to(device, dtype)
    return LayerWeights(
        input_norm=input_norm,
        qkv=matrix(pieces.qkv, input_norm),
        qkv_bias=bias,
        q_norm=vector("self_attn.q_norm.weight", config.head_dim) if config.qk_norm else None,
        k_norm=vector("self_attn.k_norm.weight", config.head_dim) if config.qk_norm else None,
        o=matrix(pieces.o),
        o_bias=vector("self_attn.o_proj.bias") if config.o_bias and shard.rank == 0 else None,
        post_norm=post_norm,
        gate_up=matrix(pieces.gate_up, post_norm, alternating),
        down=matrix(pieces.down),
    )


def _fold(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Multiply a norm's weight into the columns, in fp32, by slices of rows (memory)."""
    scale = norm.float()
    for rows in torch.split(weight, 8192):
        rows.copy_(rows.float() * scale)
    return weight
