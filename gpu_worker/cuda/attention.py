"""The attention of a forward pass: buffers, and the launch of what `attention_kernels.py` has compiled."""

from __future__ import annotations

import logging
import math

import torch

from gpu_worker.cuda.attention_kernels import HOPPER_TILE, AttentionKernels, box
from gpu_worker.cuda.build import Build
from gpu_worker.cuda.driver import CudaError, tensor_map
from gpu_worker.cuda.state import DeviceState
from gpu_worker.cuda.weights import LayerWeights

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
        build: Build,
        kernels: AttentionKernels,
        state: DeviceState,
        device: torch.device,
        angles: tuple[torch.Tensor, torch.Tensor],
        kv_scales: torch.Tensor | None,
    ) -> None:
        """angles, kv_scales: as of `Forward`."""
        self._config, self._kernels, self._state, self._kv_scales = build.config, kernels, state, kv_scales
        self._cosines, self._sines = angles
        self._few = build.options.few_attention  # rows up to which `decode_few.cu` is used, where it can be
        self._sms = build.card.sms
        self._box = box(build.options.block_size, HOPPER_TILE)
        self._scale = build.config.head_dim**-0.5 * math.log2(math.e)
        self._partial = torch.zeros(state.max_partials, build.config.kv_heads, build.padded, build.config.head_dim, device=device)
        self._partial_ml = torch.zeros(state.max_partials, build.config.kv_heads, 2, build.padded, device=device)
        self.arrivals = torch.zeros(state.geometry.slots, build.config.kv_heads, dtype=torch.int32, device=device)
        self.prefill_hopper = kernels.prefill_hopper
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

    # ------------------------------------------------------------ launches

    def decode(
        self, stream: int, index: int, layer: LayerWeights, rows: int, cache: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Of `rows` rows with one token each, in layer `index`: norm and rotation of q and k, the write of K and V, attention."""
        s = self._state
        norms = (t.data_ptr() if t is not None else 0 for t in (layer.q_norm, layer.k_norm))
        norms_and_angles = (*norms, self._cosines.data_ptr(), self._sines.data_ptr(), self._scale, self._config.norm_eps)
        before = (qkv.data_ptr(), cache.data_ptr(), s.table.data_ptr())
        if self._kernels.decode_few and rows <= self._few:
            blocks = 8 if rows <= 4 else 4
            grid = (rows * self._config.kv_heads * blocks, 1)
            self._kernels.decode_few[blocks](stream, grid, *before, s.rows.data_ptr(), out.data_ptr(), *norms_and_angles)
            return
        partial = (self._partial.data_ptr(), self._partial_ml.data_ptr(), self.arrivals.data_ptr())
        grid = (self._config.kv_heads, s.items_launched(rows))
        self._kernels.decode_many(
            stream, grid, *before, s.items.data_ptr(), out.data_ptr(), *partial, *norms_and_angles, *self.scales_of(index)
        )

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
        kernel = self._kernels.prefill_plain[tokens > LONG_ROWS * rows]
        grid = (self._config.kv_heads, tiles)
        kernel(stream, grid, qkv.data_ptr(), cache.data_ptr(), *step, *self.scales_of(index))

    def scales_of(self, layer: int) -> tuple[int, ...]:
        """What kernels that know of an fp8 cache are given in addition."""
        return () if self._kv_scales is None else (self._kv_scales[layer].data_ptr(),)
