"""The attention of a forward pass: which kernels a model, its cache and the card take, and their launch."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from gpu_worker.cuda.driver import CudaError, Kernel, Module, tensor_map
from gpu_worker.cuda.kernels.decode_attention import decode_attention
from gpu_worker.cuda.kernels.prefill_attention import prefill_attention
from gpu_worker.cuda.state import TILE, DeviceState
from gpu_worker.cuda.triton_kernel import TritonKernel
from gpu_worker.cuda.weights import LayerWeights
from gpu_worker.loading.config import ModelConfig

log = logging.getLogger("worker")

LONG_ROWS = 2048  # tokens a row, on average, from which Triton's prefill attention gains by larger tiles


def _not_known(error: Exception) -> None:
    """Say that the kernel for Hopper cannot be had; error: whatever a compiler raises."""
    told = (str(error).strip() or repr(error)).splitlines()[-1]
    log.warning("this version of Triton does not compile prefill_hopper.py, prefill is slower: %s", told)


class Attention:
    """Decode: `decode_few.cu` for few rows, `decode_attention.py` for more. Prefill: `prefill_hopper.py`, or `prefill_attention.py`.

    `qkv` and `out` are a step's tokens [tokens, (heads + 2 kv_heads) · head_dim] and [tokens, heads · head_dim], `cache` a layer's blocks.
    """

    def __init__(
        self,
        config: ModelConfig,
        state: DeviceState,
        cache: torch.Tensor,
        dtype: torch.dtype,
        angles: tuple[torch.Tensor, torch.Tensor],
        kv_scales: torch.Tensor | None,
        *,
        pdl: bool,
        few: int,
        hopper: bool,
    ) -> None:
        """cache: a layer's, of any number of blocks. angles, kv_scales: as of `Forward`. few: rows up to which `decode_few.cu` is used,
        where it can be; 0: it cannot. hopper: whether `prefill_hopper.py` is used, where it can be."""
        self._config, self._state, self._dtype, self._kv_scales, self._pdl = config, state, dtype, kv_scales, pdl
        self._cosines, self._sines = angles
        self._few = few
        self._sms = torch.cuda.get_device_properties(cache.device).multi_processor_count
        self._repeat = config.heads // config.kv_heads
        self._padded = 1 << (self._repeat - 1).bit_length()
        # a model without a window, or whose window no sequence outgrows, pays nothing for it; no supported family caps its scores
        self._window = config.sliding_window if config.sliding_window < state.geometry.max_model_len else 0
        self._scale = config.head_dim**-0.5 * math.log2(math.e)
        self._partial = torch.zeros(state.max_partials, config.kv_heads, self._padded, config.head_dim, device=cache.device)
        self._partial_ml = torch.zeros(state.max_partials, config.kv_heads, 2, self._padded, device=cache.device)
        self.arrivals = torch.zeros(state.geometry.slots, config.kv_heads, dtype=torch.int32, device=cache.device)
        self._begin_decode()
        self.prefill_hopper: TritonKernel | None
        try:
            self.prefill_hopper = self._begin_hopper(cache) if hopper else None
        except Exception as error:
            _not_known(error)
            self.prefill_hopper = None
        self.prefill_plain = self._begin_prefill()
        self._settled = False

    def settled(self) -> bool:
        """Whether it is known how a prefill is computed from now on: the kernel for Hopper takes seconds to compile at a first start, and
        until it is there the other one serves. Gluon is experimental: a Triton that has changed it does not compile it at all."""
        if self._settled or self.prefill_hopper is None:
            return True
        if not self.prefill_hopper.compiled():
            return False
        self._settled = True
        try:
            self.prefill_hopper.load()
        except CudaError:
            raise
        except Exception as error:
            _not_known(error)
            self.prefill_hopper = None
        return True

    def wait(self) -> None:
        """Until it is settled."""
        if self.prefill_hopper is not None:
            self.prefill_hopper.wait()
        self.settled()

    # ------------------------------------------------------------ kernels, whose compilation begins

    def _sizes(self) -> dict[str, Any]:
        c, g = self._config, self._state.geometry
        sizes = {
            "WIDTH": g.table_width,
            "KV_HEADS": c.kv_heads,
            "R": self._repeat,
            "RP": self._padded,
            "D": c.head_dim,
            "PAGE": g.block_size,
        }
        kind = {"DP": 1 << (c.head_dim - 1).bit_length(), "WINDOW": self._window, "SOFTCAP": 0}
        return sizes | kind | ({} if self._kv_scales is not None else {"kv_scales": None})

    def _cached(self) -> tuple[torch.dtype, list[torch.dtype]]:
        """Type of the cache's elements, and of what kernels are given in addition where it is fp8."""
        return (self._dtype, []) if self._kv_scales is None else (torch.float8_e4m3fn, [torch.float32])

    def _begin_decode(self) -> None:
        c, g, dtype, ints, fp32 = self._config, self._state.geometry, self._dtype, torch.int32, torch.float32
        cached, scales = self._cached()
        arguments: list[torch.dtype | float] = [dtype, cached, ints, ints, dtype, fp32, fp32, ints, dtype, dtype, fp32, fp32]
        self.decode_many = TritonKernel(
            decode_attention,
            [*arguments, self._scale, c.norm_eps, *scales],
            warps=4,
            pdl=self._pdl,
            TILE=TILE,
            STAGES=2,
            QK_NORM=int(c.qk_norm),
            PDL=int(self._pdl),
            PACKED=int(self._state.pack > 1),
            **self._sizes(),
        )
        self.decode_few: dict[int, Kernel] = {}  # by blocks of a cluster
        plain = dtype == torch.bfloat16 and self._kv_scales is None and not self._window
        if plain and self._repeat <= 4 and c.head_dim in (64, 128, 256) and self._few:
            names = ("KV_HEADS", "R", "DIM", "PAGE", "WIDTH")
            macros = dict(zip(names, (c.kv_heads, self._repeat, c.head_dim, g.block_size, g.table_width), strict=True))
            for blocks in (4, 8):
                module = Module.of("decode_few.cu", "sm_90a", macros | {"CL": blocks, "QK_NORM": int(c.qk_norm)})
                self.decode_few[blocks] = Kernel(module, "decode_few", "PPPPPPPPPff", 256, blocks, pdl=self._pdl)

    def _begin_prefill(self) -> tuple[TritonKernel, TritonKernel]:
        """For short rows and for long ones."""
        dtype, ints, (cached, scales) = self._dtype, torch.int32, self._cached()
        wide = dtype == torch.float32  # no tensor cores: fewer rows and warps
        large = self._config.head_dim > 128  # three stages of 64 keys would not fit the shared memory

        def begin(tile: int) -> TritonKernel:
            return TritonKernel(
                prefill_attention,
                [dtype, cached, ints, ints, ints, dtype, self._scale, *scales],
                warps=4 if wide else 8,
                pdl=False,
                ROWS=self._state.tile_tokens * self._padded,
                TILE=tile,
                STAGES=2 if wide or large else 3,
                **self._sizes(),
            )

        return begin(32), begin(32 if wide or large else 64)

    def _begin_hopper(self, cache: torch.Tensor) -> TritonKernel | None:
        """None where the kernel does not know the type, the window, the heads or the pages."""
        c, page, dtype = self._config, self._state.geometry.block_size, self._dtype
        if dtype == torch.float32 or self._kv_scales is not None or self._window or page % 8 or c.head_dim not in (64, 128):
            return None
        if self._repeat != self._padded:
            return None
        from gpu_worker.cuda.kernels import prefill_hopper as kernel

        if kernel.TILE % page and page % kernel.TILE:  # a box lies in one page, and a tile is whole boxes
            return None
        self._box = kernel.box(page, kernel.TILE)
        ints = torch.int32
        return TritonKernel(
            kernel.prefill_attention_hopper,
            [kernel.pages(cache, kernel.TILE), dtype, ints, ints, ints, dtype, self._scale, 0],
            warps=4,
            pdl=False,
            WIDTH=self._state.geometry.table_width,
            KV_HEADS=c.kv_heads,
            R=self._repeat,
            D=c.head_dim,
            PAGE=page,
            TILE=kernel.TILE,
            STAGES=kernel.STAGES,
            TURNS=kernel.TURNS,
            waited_for=False,
        )

    # ------------------------------------------------------------ launches

    def decode(
        self, stream: int, index: int, layer: LayerWeights, rows: int, cache: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Of `rows` rows with one token each, in layer `index`: norm and rotation of q and k, the write of K and V, attention."""
        s = self._state
        norms = (t.data_ptr() if t is not None else 0 for t in (layer.q_norm, layer.k_norm))
        norms_and_angles = (*norms, self._cosines.data_ptr(), self._sines.data_ptr(), self._scale, self._config.norm_eps)
        before = (qkv.data_ptr(), cache.data_ptr(), s.table.data_ptr())
        if self.decode_few and rows <= self._few:
            blocks = 8 if rows <= 4 else 4
            grid = (rows * self._config.kv_heads * blocks, 1)
            self.decode_few[blocks](stream, grid, *before, s.rows.data_ptr(), out.data_ptr(), *norms_and_angles)
            return
        partial = (self._partial.data_ptr(), self._partial_ml.data_ptr(), self.arrivals.data_ptr())
        grid = (self._config.kv_heads, s.items_launched(rows))
        self.decode_many(stream, grid, *before, s.items.data_ptr(), out.data_ptr(), *partial, *norms_and_angles, *self.scales_of(index))

    def prefill(
        self, stream: int, index: int, rows: int, tokens: int, tiles: int, cache: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Of rows of any length, q and k rotated, K and V in the cache."""
        s = self._state
        step = (s.table.data_ptr(), s.tiles.data_ptr(), s.rows.data_ptr(), out.data_ptr(), self._scale)
        if self.settled() and self.prefill_hopper is not None:
            pages = tensor_map(cache.data_ptr(), cache.numel() // cache.shape[-1], cache.shape[-1], self._box)
            grid = (min(self._sms, tiles * self._config.kv_heads), 1)
            self.prefill_hopper(stream, grid, *pages, qkv.data_ptr(), *step, tiles)
            return
        kernel = self.prefill_plain[tokens > LONG_ROWS * rows]
        grid = (self._config.kv_heads, tiles)
        kernel(stream, grid, qkv.data_ptr(), cache.data_ptr(), *step, *self.scales_of(index))

    def scales_of(self, layer: int) -> tuple[int, ...]:
        """What kernels that know of an fp8 cache are given in addition."""
        return () if self._kv_scales is None else (self._kv_scales[layer].data_ptr(),)
