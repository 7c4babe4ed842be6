"""A forward pass as a sequence of kernel launches on one stream, over buffers allocated once (so that graphs can keep them).

`decode`: every row one token; five kernels a layer for few rows, eight for more. `prefill`: rows of any length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from gpu_worker.cuda.attention import Attention
from gpu_worker.cuda.driver import Kernel, Module
from gpu_worker.cuda.fp8 import Fp8Products
from gpu_worker.cuda.linears import LinearKernel, best_cut, best_mid_cut
from gpu_worker.cuda.state import INPUTS, MANY_ROWS, PREPARE, SLOTS, DeviceState
from gpu_worker.cuda.weights import LayerWeights, Matrix, UnreadWeights
from gpu_worker.loading.config import ModelConfig
from gpu_worker.loading.source import FP8_GROUP, Fp8

Layers = Iterable[tuple[int, LayerWeights]]

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # macro DTYPE
SAMPLE_SPLITS = 64  # programs over the vocabulary for few outputs


def arch_of(device: torch.device) -> str:
    """What kernels for a card are compiled for, as NVRTC calls it."""
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}" + ("a" if properties.major == 9 else "")


class Forward:
    """One model's kernels on one card. `cache`: [layers, blocks + 1, 2, kv_heads, block_size, head_dim], fp8 or of the model's type."""

    def __init__(
        self,
        config: ModelConfig,
        unread: UnreadWeights,
        state: DeviceState,
        cache: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        *,
        pdl: bool = True,
        few: bool = True,
        few_fp8: bool = True,
        few_attention: int = 8,
        prefill_hopper: bool = True,
        kv_scales: torch.Tensor | None = None,
    ) -> None:
        """Kernels are begun before the weights are read, and compile meanwhile.

        angles: cosines and sines, fp32 [positions, head_dim / 2]. pdl, few, few_fp8, prefill_hopper: whether PDL, linear.cu, it with
        fp8 weights and prefill_hopper.py are used, where they can be. few_attention: up to so many rows decode attention is
        `decode_few.cu`'s. kv_scales: with an fp8 cache, fp32 [layers, 4]: units of keys and of values, then two words unused, since
        kernels want 16 bytes."""
        self.config, self.state, self.cache = config, state, cache
        self.cosines, self.sines = angles
        self.kv_scales = kv_scales
        g, device, dtype = state.geometry, cache.device, unread.dtype
        properties = torch.cuda.get_device_properties(device)
        hopper = properties.major == 9  # clusters, wgmma; elsewhere cuBLAS and Triton do it
        self.pdl = pdl and properties.major >= 9
        self.sms = properties.multi_processor_count
        arch = self.arch = arch_of(device)
        few = few and hopper and dtype == torch.bfloat16
        self._compile(arch, dtype, few, few and few_fp8)
        self.attention = Attention(
            config, state, cache[0], dtype, angles, kv_scales, pdl=self.pdl, few=few_attention * hopper, hopper=prefill_hopper and hopper
        )

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

    def _compile(self, arch: str, dtype: torch.dtype, few: bool, few_fp8: bool) -> None:
        """Begin all CUDA kernels, of which is compiled what the disk cache lacks."""
        c = self.config
        linears: dict[str, tuple[int, int, dict[str, bool]]] = {
            "qkv": (c.q_size + 2 * c.kv_size, c.hidden, {"norm": True, "bias": c.qkv_bias}),
            "o": (c.hidden, c.q_size, {"residual": True, "bias": c.o_bias}),
            "gate_up": (2 * c.intermediate, c.hidden, {"norm": True, "silu": True}),
            "down": (c.hidden, c.intermediate, {"residual": True}),
            "head": (c.vocab_size, c.hidden, {}),
        }

        def begin(name: str, fp8: int) -> LinearKernel:
            n, k, roles = linears[name]
            cut = best_cut(n, k, "norm" in roles, self.sms, fp8) if few else None
            return LinearKernel(cut, best_mid_cut(n, k) if few and not fp8 else None, arch, c.norm_eps, **roles)

        self.linears = {name: begin(name, 0) for name in linears}
        self.fp8_linears: dict[str, LinearKernel] = {}  # of few tokens, where a checkpoint's weights are fp8
        if c.quantization is not None and few_fp8:
            scales = FP8_GROUP if c.quantization.by_block else 1
            self.fp8_linears = {name: begin(name, scales) for name in linears if name != "head"}
        fp8 = self.kv_scales is not None
        plan = Module.of("plan.cu", arch)
        elementwise = Module.of("elementwise.cu", arch, {"DTYPE": DTYPES[dtype], "DIM": c.head_dim} | ({"KV8": 1} if fp8 else {}))
        self.k_prepare = Kernel(plan, "prepare", PREPARE, 1024, pdl=False)
        self.k_prepare_packed = self.k_prepare
        if self.state.pack > 1:
            packing = Module.of("plan.cu", arch, {"PACK": self.state.pack})
            self.k_prepare_packed = Kernel(packing, "prepare", PREPARE, 1024, pdl=False)
        self.k_expand = Kernel(plan, "expand", SLOTS + INPUTS + "Pii", 256, pdl=self.pdl)
        self.k_copy = Kernel(plan, "copy_blocks", INPUTS + "PiiPiPii", 256, pdl=False)
        self.k_mark = Kernel(plan, "mark", INPUTS + "Pi", 1, pdl=False)
        self.k_embed = Kernel(elementwise, "embed", "PPPi", 128, pdl=self.pdl)
        vectors = c.hidden * dtype.itemsize // 16
        self.k_norm = Kernel(elementwise, "rms_norm", "PPPPif", min(256, -(-vectors // 32) * 32), pdl=self.pdl)
        self.k_rotate = Kernel(elementwise, "rotate_and_store", "PPPPPPPPiiif" + "P" * fp8, 256, pdl=self.pdl)
        self.k_silu = Kernel(elementwise, "silu_mul", "PPq", 256, pdl=self.pdl)
        self.k_sample, self.k_sample_wide = (
            Kernel(Module.of("sampler.cu", arch, {"DTYPE": DTYPES[of]}), "sample", "PPPPPPPPPiii", 256, pdl=self.pdl)
            for of in (dtype, torch.float32)
        )

    # ------------------------------------------------------------ the step's parts

    def prepare(self, stream: int, bucket: int, decode: bool, tokens: int = 0, tiles: int = 0) -> None:
        """Consume one ring entry: deltas, and `bucket` rows; for a decode step its inputs and work list, else the numbers of tokens and
        tiles that will be launched."""
        kernel = self.k_prepare_packed if bucket >= MANY_ROWS else self.k_prepare
        kernel(stream, (1, 1), *self.state.prepare_arguments(bucket, decode, tokens, tiles))

    def decode(self, stream: int, bucket: int, layers: Layers | None = None) -> None:
        """Embedding to logits of `bucket` rows, through all layers or those given."""
        self.k_embed(
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
        self.k_copy(stream, (count, self.config.layers), *s.inputs_arguments, s.ring.data_ptr(), s.entry_words, first, *caches, vectors)

    def prefill(self, stream: int, rows: int, tokens: int, tiles: int, logit_rows: int, layers: Layers | None = None) -> None:
        """Rows of any length, embedding to logits of the rows that sample, through all layers or those given."""
        s, c, g = self.state, self.config, self.state.geometry
        ring = (s.ring.data_ptr(), s.entry_words)
        lanes = 1 << (c.head_dim * self.h.element_size() // 16 - 1).bit_length()  # threads per head
        self.k_expand(stream, (rows, max(1, min(64, tokens // rows // 256))), *s.slots_arguments, *s.inputs_arguments, *ring, g.block_size)
        self.k_embed(stream, (tokens, 1), s.tokens.data_ptr(), self.weights.embedding.data_ptr(), self.h.data_ptr(), c.hidden)
        for index, layer in self.layers if layers is None else layers:
            self._qkv(stream, layer, tokens)
            self.k_rotate(
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
        (self.k_sample if wide is None else self.k_sample_wide)(
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
        self.k_mark(stream, (1, 1), *self.state.inputs_arguments, self.state.result_ring.data_ptr(), self.state.result_words // 2)

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
            self.k_silu(stream, (-(-count // per_block), 1), self.gate_up.data_ptr(), activated, count)
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
        self.k_norm(stream, (rows, 1), source.data_ptr(), index, weight, self.x.data_ptr(), self.config.hidden, self.config.norm_eps)
