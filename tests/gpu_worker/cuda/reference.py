"""A decoder of the Llama family in plain torch, in any dtype: what the kernels are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from gpu_worker.layers.rope import rope_table
from gpu_worker.loading.config import ModelConfig
from gpu_worker.loading.source import Shard, TensorSource, layer_pieces

Rounding = Callable[[torch.Tensor], torch.Tensor]


def unrounded(x: torch.Tensor) -> torch.Tensor:
    return x


class Reference:
    """Weights of a source, converted to `dtype` after they were rounded to `stored`."""

    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        stored: torch.dtype,
        dtype: torch.dtype,
        device: str = "cuda",
        into: Rounding = unrounded,
        cached: Rounding = unrounded,
    ) -> None:
        """into: what a layer's linears make of their input [n, k]; cached: what the cache makes of keys and values [2, n, heads, d]."""
        self.config, self.dtype, self.into, self.cached = config, dtype, into, cached

        def read(pieces):
            return torch.cat([source.read(p).to(device, stored) for p in pieces]).to(dtype)

        def vector(name):
            return source.vector(name).to(device, stored).to(dtype)

        from gpu_worker.loading.source import Piece

        vocab = ((0, config.vocab_size), (0, config.hidden))
        self.embedding = read([Piece("model.embed_tokens.weight", *vocab)])
        self.head = self.embedding if config.tied_embeddings else read([Piece("lm_head.weight", *vocab)])
        self.norm = vector("model.norm.weight")
        self.layers = []
        for i in range(config.layers):
            p, pieces = f"model.layers.{i}.", layer_pieces(config, i, Shard())
            self.layers.append(
                {
                    "qkv": read(pieces.qkv),
                    "o": read(pieces.o),
                    "gate_up": read(pieces.gate_up),
                    "down": read(pieces.down),
                    "in": vector(p + "input_layernorm.weight"),
                    "post": vector(p + "post_attention_layernorm.weight"),
                    "bias": torch.cat([vector(f"{p}self_attn.{x}_proj.bias") for x in "qkv"]) if config.qkv_bias else None,
                    "qn": vector(p + "self_attn.q_norm.weight") if config.qk_norm else None,
                    "kn": vector(p + "self_attn.k_norm.weight") if config.qk_norm else None,
                }
            )

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of every position of one sequence, [n, vocab]."""
        c, n = self.config, len(tokens)
        table = rope_table(c, n).to(tokens.device, self.dtype if self.dtype == torch.float64 else torch.float32)
        cos, sin = table[:, None, 0, : c.head_dim // 2], table[:, None, 1, c.head_dim // 2 :]

        def norm(x, w):
            wide = x if self.dtype == torch.float64 else x.float()
            return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + c.norm_eps)).to(self.dtype) * w

        def rotate(x):
            wide = x.to(cos.dtype)
            a, b = wide.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(self.dtype)

        back = torch.arange(n, device=tokens.device)[:, None] - torch.arange(n, device=tokens.device)
        seen = (back >= 0) & (back < (c.sliding_window or n))
        h = self.embedding[tokens.long()]
        for w in self.layers:
            qkv = self.into(norm(h, w["in"])) @ w["qkv"].t()
            if w["bias"] is not None:
                qkv = qkv + w["bias"]
            q, k, v = qkv.split((c.q_size, c.kv_size, c.kv_size), -1)
            q, k, v = q.view(n, c.heads, -1), k.view(n, c.kv_heads, -1), v.view(n, c.kv_heads, -1)
            if w["qn"] is not None:
                q, k = norm(q, w["qn"]), norm(k, w["kn"])
            q, k = rotate(q), rotate(k)
            k, v = (x.repeat_interleave(c.heads // c.kv_heads, 1) for x in self.cached(torch.stack((k, v))))
            a = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=seen)
            h = h + self.into(a.transpose(0, 1).reshape(n, -1)) @ w["o"].t()
            gate, up = (self.into(norm(h, w["post"])) @ w["gate_up"].t()).chunk(2, -1)
            h = h + self.into(F.silu(gate) * up) @ w["down"].t()
        return norm(h, self.norm) @ self.head.t()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; NaN never passes a comparison."""
    return float((got.double() - want.double()).norm() / want.double().norm())
