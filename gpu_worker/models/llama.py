"""The Llama family: Llama, Mistral, Qwen2, Qwen3 and what is shaped like them, written once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_worker.attention.interface import Attention
from gpu_worker.layers.functions import rms_norm, rotation, silu_mul
from gpu_worker.layers.rope import turns
from gpu_worker.layers.stream import Stream
from gpu_worker.loading.config import ModelConfig
from gpu_worker.models.weights import LayerWeights, Weights


class Llama:
    """A decoder whose every row is computed alike, whatever rows are beside it (as far as its linears are).

    The residual stream has the dtype of the embedding's vectors.
    """

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int, device: torch.device) -> None:
        self.config = config
        self.weights = weights
        self._turns = turns(config, max_model_len).to(device)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, attention: Attention, begun: Callable[[], None]
    ) -> torch.Tensor:
        """The final hidden states of some tokens of a step, normed, for `logits`.

        ids, positions: int64 [tokens]. last: int64 [n], which tokens are wanted. `attention.begin` has been called.
        begun: called as each layer begins. Returns [n, hidden].
        """
        config, weights = self.config, self.weights
        x = Stream(weights.embedding.lookup(ids), config.norm_eps)
        heads = _Heads(config, x, self._turns[positions])
        for i, layer in enumerate(weights.layers):
            begun()
            heads.fill(layer, x.normed(layer.input_norm), config.norm_eps)
            x.add(layer.o(attention.attend(i, heads.q, heads.kv)))
            if i == config.layers - 1:
                x = x.rows(last)
                if not len(last):
                    return x.new_empty(config.hidden)  # torch divides by the number of rows to be normed
            x.add(layer.down(silu_mul(layer.gate_up(x.normed(layer.post_norm)))))
        return x.normed(weights.norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What follows each of these tokens, float32 [n, vocab]. hidden: [n, hidden] of `forward`."""
        if not len(hidden):
            return hidden.new_zeros(0, self.config.vocab_size, dtype=torch.float32)
        return self.weights.head(hidden).float()


class _Heads:
    """Where every layer puts its queries, keys and values, with the views that it needs of them.

    q: [rows, heads, head_dim]. kv: [rows, 2 · kv_heads, head_dim], keys first.
    """

    def __init__(self, config: ModelConfig, x: Stream, turns: torch.Tensor) -> None:
        """turns: those of the rows' positions, complex64 [rows, 1, head_dim / 2]."""
        rotated = config.heads + config.kv_heads
        self._all = x.new_empty(config.q_size + 2 * config.kv_size)
        by_head = self._all.view(-1, rotated + config.kv_heads, config.head_dim)
        self.q = by_head[:, : config.heads]
        self._k = by_head[:, config.heads : rotated]
        self.kv = by_head[:, config.heads :]
        self._rotate = rotation(by_head[:, :rotated], turns)

    def fill(self, layer: LayerWeights, x: torch.Tensor, eps: float) -> None:
        """Project, norm and rotate. x: [rows, hidden]."""
        self._all.copy_(layer.qkv(x))
        if layer.q_norm is not None and layer.k_norm is not None:
            self.q.copy_(rms_norm(self.q, layer.q_norm, eps))
            self._k.copy_(rms_norm(self._k, layer.k_norm, eps))
        self._rotate()
