"""The Llama family: Llama, Mistral, Qwen2, Qwen3 and what is shaped like them, written once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_worker.attention.interface import Attention
from gpu_worker.layers.functions import rms_norm, rotate_, silu_mul
from gpu_worker.layers.rope import rope_table
from gpu_worker.loading.config import ModelConfig
from gpu_worker.models.weights import LayerWeights, Weights


class Llama:
    """A decoder whose every row is computed alike, whatever rows are beside it (as far as its linears are).

    The residual stream has the dtype of the embedding's vectors.
    """

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int, device: torch.device) -> None:
        self.config = config
        self.weights = weights
        self._rope = rope_table(config, max_model_len).to(device)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, attention: Attention, begun: Callable[[], None]
    ) -> torch.Tensor:
        """The final hidden states of some tokens of a step, for `logits`.

        ids, positions: int64 [tokens]. last: int64 [n], which tokens are wanted. `attention.begin` has been called.
        begun: called as each layer begins. Returns [n, hidden].
        """
        config, weights = self.config, self.weights
        x = weights.embedding.lookup(ids)
        cos, sin = self._rope[positions].to(x.dtype).unsqueeze(2).unbind(1)
        for i, layer in enumerate(weights.layers):
            begun()
            x = x + self._attention(i, layer, rms_norm(x, layer.input_norm, config.norm_eps), cos, sin, attention)
            if i == config.layers - 1:
                x = x[last]
                if not len(last):
                    return x
            x = x + layer.down(silu_mul(layer.gate_up(rms_norm(x, layer.post_norm, config.norm_eps))))
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What follows each of these tokens, float32 [n, vocab]. hidden: [n, hidden] of `forward`."""
        if not len(hidden):
            return hidden.new_zeros(0, self.config.vocab_size, dtype=torch.float32)
        return self.weights.head(rms_norm(hidden, self.weights.norm, self.config.norm_eps)).float()

    def _attention(
        self, index: int, layer: LayerWeights, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        config = self.config
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        qkv = layer.qkv(x).view(x.shape[0], heads + 2 * kv_heads, dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
            q.copy_(rms_norm(q, layer.q_norm, config.norm_eps))
            k.copy_(rms_norm(k, layer.k_norm, config.norm_eps))
        rotate_(qkv[:, : heads + kv_heads], cos, sin)
        return layer.o(attention.attend(index, qkv[:, :heads], qkv[:, heads:]))
