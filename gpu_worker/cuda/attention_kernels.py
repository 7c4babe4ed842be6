"""Which attention kernels a model, its cache and the card take; `attention.py` launches them."""

from __future__ import annotations

from typing import Any

from gpu_worker.cuda.build import TILE, Build
from gpu_worker.cuda.driver import Kernel, Module
from gpu_worker.cuda.triton_kernel import POINTERS, Boxes, TritonKernel

HOPPER_TILE, HOPPER_STAGES, HOPPER_TURNS = 64, 4, 1  # keys of a tile, tiles in a ring, whether groups take turns with the tensor cores
BOX = 64  # columns of a box of TMA: what one swizzled row of shared memory holds


def box(page: int, tile: int) -> tuple[int, int]:
    """Rows (tokens) and columns of what TMA copies at a time, for pages and tiles of so many tokens."""
    return min(page, tile), BOX


class AttentionKernels:
    """Kernels whose compilation has begun. The cache is fp8 or of the model's type."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._pointer = POINTERS[build.dtype]
        self._cache, self._scales = ("*fp8e4nv", ["*fp32"]) if build.fp8_cache else (self._pointer, [])
        self.decode_many = self._decode_many()
        self.decode_few = self._decode_few()  # by blocks of a cluster
        self.prefill_plain = self._prefill_plain()  # for short rows and for long ones
        self.prefill_hopper = self._prefill_hopper()

    def _sizes(self) -> dict[str, Any]:
        b, c = self._build, self._build.config
        sizes = {"WIDTH": b.width, "KV_HEADS": c.kv_heads, "R": b.repeat, "RP": b.padded, "D": c.head_dim, "PAGE": b.options.block_size}
        # no supported family caps its scores
        kind = {"DP": 1 << (c.head_dim - 1).bit_length(), "WINDOW": b.window, "SOFTCAP": 0}
        return sizes | kind | ({} if b.fp8_cache else {"kv_scales": None})

    def _decode_many(self) -> TritonKernel:
        b, q, ints, fp32 = self._build, self._pointer, "*i32", "*fp32"
        return TritonKernel(
            "decode_attention.decode_attention",
            [q, self._cache, ints, ints, q, fp32, fp32, ints, q, q, fp32, fp32, "fp32", "fp32", *self._scales],
            b.card.capability,
            warps=4,
            pdl=b.pdl,
            TILE=TILE,
            STAGES=2,
            QK_NORM=int(b.config.qk_norm),
            PDL=int(b.pdl),
            PACKED=int(b.pack > 1),
            **self._sizes(),
        )

    def _decode_few(self) -> dict[int, Kernel]:
        """Empty where `decode_few.cu` does not know the model or the card."""
        b, c, kernels = self._build, self._build.config, {}
        plain = b.dtype == "bfloat16" and not b.fp8_cache and not b.window
        if plain and b.repeat <= 4 and c.head_dim in (64, 128, 256) and b.card.hopper and b.options.few_attention:
            names = ("KV_HEADS", "R", "DIM", "PAGE", "WIDTH")
            macros = dict(zip(names, (c.kv_heads, b.repeat, c.head_dim, b.options.block_size, b.width), strict=True))
            for blocks in (4, 8):
                module = Module.of("decode_few.cu", b.card.arch, macros | {"CL": blocks, "QK_NORM": int(c.qk_norm)})
                kernels[blocks] = Kernel(module, "decode_few", "PPPPPPPPPff", 256, blocks, pdl=b.pdl)
        return kernels

    def _prefill_plain(self) -> tuple[TritonKernel, TritonKernel]:
        b, q, ints = self._build, self._pointer, "*i32"
        wide = b.dtype == "float32"  # no tensor cores: fewer rows and warps
        large = b.config.head_dim > 128  # three stages of 64 keys would not fit the shared memory; elsewhere not two of 32
        stages = (2 if b.card.shared > 128 << 10 else 1) if large else 2 if wide else 3

        def begin(tile: int) -> TritonKernel:
            return TritonKernel(
                "prefill_attention.prefill_attention",
                [q, self._cache, ints, ints, ints, q, "fp32", *self._scales],
                b.card.capability,
                warps=4 if wide else 8,
                pdl=False,
                ROWS=b.tile_tokens * b.padded,
                TILE=tile,
                STAGES=stages,
                **self._sizes(),
            )

        return begin(32), begin(32 if wide or large else 64)

    def _prefill_hopper(self) -> TritonKernel | None:
        """None where it is not wanted or does not know the card, the type, the window, the heads or the pages."""
        b, c, page, ints = self._build, self._build.config, self._build.options.block_size, "*i32"
        if not b.options.prefill_hopper or not b.card.hopper or b.fp8_cache or b.window:
            return None
        if b.dtype == "float32" or page % 8 or c.head_dim not in (64, 128) or b.repeat != b.padded:
            return None
        if HOPPER_TILE % page and page % HOPPER_TILE:  # a box lies in one page, and a tile is whole boxes
            return None
        return TritonKernel(
            "prefill_hopper.prefill_attention_hopper",
            [Boxes(self._pointer, box(page, HOPPER_TILE)), self._pointer, ints, ints, ints, self._pointer, "fp32", "i32"],
            b.card.capability,
            warps=4,
            pdl=False,
            WIDTH=b.width,
            KV_HEADS=c.kv_heads,
            R=b.repeat,
            D=c.head_dim,
            PAGE=page,
            TILE=HOPPER_TILE,
            STAGES=HOPPER_STAGES,
            TURNS=HOPPER_TURNS,
            waited_for=False,
        )
