"""A forward pass as a sequence of kernel launches on one stream, over buffers allocated once (so that graphs can keep them).

`decode`: every row one token; five kernels a layer for few rows, eight for more. `prefill`: rows of any length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from gpu_worker.cuda.attention import Attention
from gpu_worker.cuda.fp8 import Fp8Products
from gpu_worker.cuda.kernels_of import Kernels
from gpu_worker.cuda.state import MANY_ROWS, DeviceState
from gpu_worker.cuda.weights import LayerWeights, Matrix, UnreadWeights
from gpu_worker.loading.source import Fp8

Layers = Iterable[tuple[int, LayerWeights]]

SAMPLE_SPLITS = 64  # programs over the vocabulary for few outputs


class Forward:
    """One model on one card. `cache`: [layers, blocks + 1, 2, kv_heads, block_size, head_dim], fp8 or of the model's type."""

    def __init__(
        self,
        kernels: Kernels,
        unread: UnreadWeights,
        state: DeviceState,
        cache: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        kv_scales: torch.Tensor | None = None,
    ) -> None:
        """The weights are read while the kernels are compiled.

        angles: cosines and sines, fp32 [positions, head_dim / 2]. kv_scales: with an fp8 cache, fp32 [layers, 4]: units of keys and of
        values, then two words unused, since kernels want 16 bytes."""
        self.config, self.kernels, self.state, self.cache = kernels.build.config, kernels.step, state, cache
        self.linears, self.fp8_linears = kernels.step.linears, kernels.step.fp8_linears
        self.cosines, self.sines = angles
        self.kv_scales = kv_scales
        config, g, device, dtype = self.config, state.geometry, cache.device, unread.dtype
        self.attention = Attention(kernels.build, kernels.attention, state, device, angles, kv_scales)

        self.weights = weights = unread.read()
        self.layers = list(enumerate(weights.layers))
        tokens, qkv = -(-state.max_tokens // 4) * 4, config.q_size + 2 * config.kv_size  # fp8 products go by four rows

        def buffer(rows: int, width: int) -> torch.Tensor:
            return torch.zeros(rows, width, dtype=dtype, device=device)

        self.h, self.x = buffer(tokens, config.hidden), buffer(tokens, config.hidden)
        self.qkv, self.attended = buffer(tokens, qkv), buffer(tokens, config.q_size)
        self.gate_up, self.activated = buffer(tokens, 2 * config.intermediate), buffer(tokens, config.intermediate)
        # rows of whole 16 bytes; what lies behind the vocabulary is never sampled
        self._logits = torch.full((g.slots, -(-config.vocab_size // 8) * 8), -math.inf, dtype=dtype, device=device)
        self.logits, self.logits_width = self._logits[:, : config.vocab_size], self._logits.shape[1]
        self.best = torch.zeros(g.slots, SAMPLE_SPLITS, 4, dtype=torch.int32, device=device)
        self.sample_arrivals = torch.zeros(g.slots, dtype=torch.int32, device=device)
        matrices = [m for layer in weights.layers for m in layer.matrices]
        # layers that together launch every kernel there is: a checkpoint may leave some linears of some layers in 16 bits
        self.one_of_each = list({tuple(isinstance(m, Fp8) for m in layer.matrices): (i, layer) for i, layer in self.layers}.values())
        self.fp8 = Fp8Products([m for m in matrices if isinstance(m, Fp8)], dtype, tokens, device)

    # ------------------------------------------------------------ the step's parts

    def prepare(self, stream: int, bucket: int, decode: bool, tokens: int = 0, tiles: int = 0) -> None:
        """Consume one ring entry: deltas, and `bucket` rows; for a decode step its inputs and work list, else the numbers of tokens and
        tiles that will be launched."""
        kernel = self.kernels.prepare_packed if bucket >= MANY_ROWS else self.kernels.prepare
        kernel(stream, (1, 1), *self.state.prepare_arguments(bucket, decode, tokens, tiles))

    def decode(self, stream: int, bucket: int, layers: Layers | None = None) -> None:
        """Embedding to logits of `bucket` rows, through all layers or those given."""
        self.kernels.embed(
            stream, (bucket, 1), self.state.tokens.data_ptr(), self.weights.embedding.data_ptr(), self.h.data_ptr(), self.config.hidden
        )
        for index, layer in self.layers if layers is None else layers:
            self._qkv(stream, layer, bucket)
            self.attention.decode(stream, index, layer, bucket, self.cache[index], self.qkv, self.attended)
            self._rest(stream, layer, bucket)
        self._head(stream, bucket)

    def copy(self, stream: int, first: int, count: int, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy `count` whole blocks, as the ring entry in use says from its copy `first` on, between caches of any place."""
        s, vectors = self.state, self.cache[0, 0].numel() * self.cache.element_size() // 16
        caches = (source.data_ptr(), source.shape[1], target.data_ptr(), target.shape[1])
        self.kernels.copy(
            stream, (count, self.config.layers), *s.inputs_arguments, s.ring.data_ptr(), s.entry_words, first, *caches, vectors
        )

    def prefill(self, stream: int, rows: int, tokens: int, tiles: int, logit_rows: int, layers: Layers | None = None) -> None:
        """Rows of any length, embedding to logits of the rows that sample, through all layers or those given."""
        s, c, g = self.state, self.config, self.state.geometry
        ring = (s.ring.data_ptr(), s.entry_words)
        lanes = 1 << (c.head_dim * self.h.element_size() // 16 - 1).bit_length()  # threads per head
        self.kernels.expand(
            stream, (rows, max(1, min(64, tokens // rows // 256))), *s.slots_arguments, *s.inputs_arguments, *ring, g.block_size
        )
        self.kernels.embed(stream, (tokens, 1), s.tokens.data_ptr(), self.weights.embedding.data_ptr(), self.h.data_ptr(), c.hidden)
        for index, layer in self.layers if layers is None else layers:
            self._qkv(stream, layer, tokens)
            self.kernels.rotate(
                stream,
                (tokens, -(-(c.heads + 2 * c.kv_heads) * lanes // 256)),
                self.qkv.data_ptr(),
                s.positions.data_ptr(),
                s.places.data_ptr(),
                layer.q_norm.data_ptr() if layer.q_norm is not None else 0,
                layer.k_norm.data_ptr() if layer.k_norm is not None else 0,
                self.cosines.data_ptr(),
                self.sines.data_ptr(),
                self.cache[index].data_ptr(),
                c.heads,
                c.kv_heads,
                g.block_size,
                c.norm_eps,
                *self.attention.scales_of(index),
            )
            self.attention.prefill(stream, index, rows, tokens, tiles, self.cache[index], self.qkv, self.attended)
            self._rest(stream, layer, tokens)
        if logit_rows:
            self._head(stream, logit_rows)

    def logits_behind(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits behind some of the tokens of the prefill that was enqueued last (their places in it, int64), float32 [n, vocab]."""
        hidden = self.h[tokens].float()
        scale = torch.rsqrt(hidden.square().mean(dim=1, keepdim=True) + self.config.norm_eps)
        normed = (hidden * scale * self.weights.final_norm.float()).to(self.h.dtype)
        return torch.mm(normed, self.weights.head.t()).float()

    def wide_logits(self, rows: int) -> torch.Tensor:
        """A copy of the logits of the step's first rows, float32 [rows, logits_width]; −∞ beyond the vocabulary."""
        return self._logits[:rows].to(torch.float32, copy=True)

    def sample(self, stream: int, outputs: int, wide: torch.Tensor | None = None) -> None:
        """A token for each output, into the slots and the result ring; `wide`: of these logits instead of the step's own."""
        s = self.state
        (self.kernels.sample if wide is None else self.kernels.sample_wide)(
            stream,
            (max(1, min(SAMPLE_SPLITS, 1024 // outputs)), outputs),
            (self._logits if wide is None else wide).data_ptr(),
            s.outputs.data_ptr(),
            s.step.data_ptr(),
            s.parameters.data_ptr(),
            s.last_token.data_ptr(),
            s.dead.data_ptr(),
            self.best.data_ptr(),
            self.sample_arrivals.data_ptr(),
            s.result_ring.data_ptr(),
            s.result_words,
            s.geometry.slots,
            self.logits_width,
        )

    def mark(self, stream: int) -> None:
        """The end of a step without outputs."""
        self.kernels.mark(stream, (1, 1), *self.state.inputs_arguments, self.state.result_ring.data_ptr(), self.state.result_words // 2)

    # ------------------------------------------------------------ the layer's parts

    def _qkv(self, stream: int, layer: LayerWeights, tokens: int) -> None:
        bias = layer.qkv_bias.data_ptr() if layer.qkv_bias is not None else 0
        if self._fused(stream, "qkv", layer.qkv, layer.input_norm, (self.h.data_ptr(), 0, bias, self.qkv.data_ptr()), tokens):
            return
        if isinstance(layer.qkv, Fp8):
            self._norm(stream, self.h, 0, layer.input_norm.data_ptr(), tokens)
            self.fp8(stream, self.x, layer.qkv, self.qkv, tokens)
            if layer.qkv_bias is not None:
                self.qkv[:tokens].add_(layer.qkv_bias)
            return
        self._norm(stream, self.h, 0, 0, tokens)
        if layer.qkv_bias is None:
            torch.mm(self.x[:tokens], layer.qkv.t(), out=self.qkv[:tokens])
        else:
            torch.addmm(layer.qkv_bias, self.x[:tokens], layer.qkv.t(), out=self.qkv[:tokens])

    def _rest(self, stream: int, layer: LayerWeights, tokens: int) -> None:
        """Everything behind attention."""
        self._add(stream, "o", self.attended, layer.o, layer.o_bias, tokens)
        gate_up, activated = layer.gate_up, self.activated.data_ptr()
        if not self._fused(stream, "gate_up", gate_up, layer.post_norm, (self.h.data_ptr(), 0, 0, activated), tokens):
            if isinstance(gate_up, Fp8):
                self._norm(stream, self.h, 0, layer.post_norm.data_ptr(), tokens)
                self.fp8(stream, self.x, gate_up, self.gate_up, tokens)
            else:
                self._norm(stream, self.h, 0, 0, tokens)
                torch.mm(self.x[:tokens], gate_up.t(), out=self.gate_up[:tokens])
            count = tokens * self.config.intermediate
            per_block = 256 * 8 // self.h.element_size()
            self.kernels.silu(stream, (-(-count // per_block), 1), self.gate_up.data_ptr(), activated, count)
        self._add(stream, "down", self.activated, layer.down, None, tokens)

    def _fused(self, stream: int, name: str, weight: Matrix, norm: torch.Tensor | None, at: tuple[int, int, int, int], tokens: int) -> bool:
        """A linear with what is around it as one kernel, where few tokens allow that; else False, and nothing is done.

        norm: whose weight fp8 columns do not hold. at: addresses of input, residual, bias and output."""
        fp8 = isinstance(weight, Fp8)
        linear = (self.fp8_linears if fp8 else self.linears).get(name)
        if linear is None or tokens > linear.most:
            return False
        if isinstance(weight, Fp8):
            linear(stream, weight.q.data_ptr(), *at, tokens, weight.scale.data_ptr(), norm.data_ptr() if norm is not None else 0)
        else:
            linear(stream, weight.data_ptr(), *at, tokens)
        return True

    def _add(self, stream: int, name: str, source: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, tokens: int) -> None:
        """h += source · weightᵀ (+ bias)."""
        h = self.h[:tokens]
        to = h.data_ptr()
        if self._fused(stream, name, weight, None, (source.data_ptr(), to, bias.data_ptr() if bias is not None else 0, to), tokens):
            return
        if isinstance(weight, Fp8):
            self.fp8(stream, source, weight, self.x, tokens)
            h.add_(self.x[:tokens])
        else:
            h.addmm_(source[:tokens], weight.t())
        if bias is not None:
            h.add_(bias)

    def _head(self, stream: int, rows: int) -> None:
        self._norm(stream, self.h, self.state.logit_rows.data_ptr(), self.weights.final_norm.data_ptr(), rows)
        linear = self.linears["head"]
        if rows <= linear.most:
            linear(stream, self.weights.head.data_ptr(), self.x.data_ptr(), 0, 0, self.logits.data_ptr(), rows)
        else:
            torch.mm(self.x[:rows], self.weights.head.t(), out=self.logits[:rows])

    def _norm(self, stream: int, source: torch.Tensor, index: int, weight: int, rows: int) -> None:
        self.kernels.norm(stream, (rows, 1), source.data_ptr(), index, weight, self.x.data_ptr(), self.config.hidden, self.config.norm_eps)
