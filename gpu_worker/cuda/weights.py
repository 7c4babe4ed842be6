"""A model's weights as the kernels want them, read from any TensorSource straight onto the card.

Two liberties are taken with a checkpoint, both exact in real numbers and rounded once: the weight of the norm before a
linear is multiplied into the linear's columns (so the kernel scales by 1 / rms alone, after its sum), and the rows of gate
and up alternate (so one kernel sees both of a pair). The final norm stays apart: embeddings may be tied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_worker.loading.config import ModelConfig
from gpu_worker.loading.source import Piece, Shard, TensorSource, layer_pieces
from gpu_worker.models.weights import stack_rows


@dataclass(frozen=True)
class LayerWeights:
    """One layer; H hidden, Q query width, V key (and value) width, I intermediate width, D head dimension."""

    qkv: torch.Tensor  # [Q + 2 V, H], the input norm's weight in its columns
    qkv_bias: torch.Tensor | None  # [Q + 2 V]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    o: torch.Tensor  # [H, Q]
    o_bias: torch.Tensor | None  # [H]
    gate_up: torch.Tensor  # [2 I, H], rows gate 0, up 0, gate 1, …, the post-attention norm's weight in its columns
    down: torch.Tensor  # [H, I]


@dataclass(frozen=True)
class ModelWeights:
    """All of a model."""

    embedding: torch.Tensor  # [vocab, H]
    head: torch.Tensor  # [vocab, H]; the embedding where they are tied
    final_norm: torch.Tensor  # [H]
    layers: list[LayerWeights]


def load_weights(source: TensorSource, config: ModelConfig, device: torch.device, dtype: torch.dtype, shard: Shard) -> ModelWeights:
    """Read everything. Raises LoadError for a missing or wrongly sized tensor."""
    vocab = ((0, config.vocab_size), (0, config.hidden))
    embedding = stack_rows(source, (Piece("model.embed_tokens.weight", *vocab),), device, dtype)
    head = embedding if config.tied_embeddings else stack_rows(source, (Piece("lm_head.weight", *vocab),), device, dtype)
    final_norm = source.vector("model.norm.weight").to(device, dtype)
    return ModelWeights(embedding, head, final_norm, [_layer(source, config, i, shard, device, dtype) for i in range(config.layers)])


def _layer(source: TensorSource, config: ModelConfig, index: int, shard: Shard, device: torch.device, dtype: torch.dtype) -> LayerWeights:
    pieces = layer_pieces(config, index, shard)
    prefix = f"model.layers.{index}."

    def vector(name: str) -> torch.Tensor:
        return source.vector(prefix + name).to(device, dtype)

    gate, up = (stack_rows(source, (piece,), device, dtype) for piece in pieces.gate_up)
    bias = None
    if config.qkv_bias:
        parts = [source.vector(p.name.replace(".weight", ".bias"))[slice(*p.rows)] for p in pieces.qkv]
        bias = torch.cat(parts).to(device, dtype)
    return LayerWeights(
        qkv=_fold(stack_rows(source, pieces.qkv, device, dtype), vector("input_layernorm.weight")),
        qkv_bias=bias,
        q_norm=vector("self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=vector("self_attn.k_norm.weight") if config.qk_norm else None,
        o=stack_rows(source, pieces.o, device, dtype),
        o_bias=vector("self_attn.o_proj.bias") if config.o_bias and shard.rank == 0 else None,
        gate_up=_fold(torch.stack((gate, up), dim=1).view(-1, config.hidden), vector("post_attention_layernorm.weight")),
        down=stack_rows(source, pieces.down, device, dtype),
    )


def _fold(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Multiply a norm's weight into the columns, in fp32, by slices of rows (memory)."""
    scale = norm.float()
    for rows in torch.split(weight, 8192):
        rows.copy_(rows.float() * scale)
    return weight
