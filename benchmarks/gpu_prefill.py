"""Prefill attention alone: chunks of prompts, some over a cached prefix, in a CUDA graph; a part of `gpu_attention.py`.

bf16, 8 KV heads of 128, pages of 16 (for comparison 64) in random order, so that a kernel reads as in a step. Each kernel is checked
first against torch's attention, on the last row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu_timing import graph_time
from gpu_worker.cuda.attention_kernels import HOPPER_STAGES, HOPPER_TILE, HOPPER_TURNS, box
from gpu_worker.cuda.driver import tensor_map
from gpu_worker.cuda.kernels import prefill_hopper
from gpu_worker.cuda.triton_kernel import Boxes, TritonKernel

KV_HEADS, D, PAGE, WIDTH = 8, 128, 16, 513
SCALE = D**-0.5 * math.log2(math.e)
CASES = {  # (prefix, tokens) of each row
    "4x2048": [(0, 2048)] * 4,
    "32x256": [(0, 256)] * 32,
    "4x8192": [(0, 8192)] * 4,
    "8x1024": [(0, 1024)] * 8,
    "8192_of_3584": [(1024, 2560), (0, 3584), (0, 2048)],
    "2048_after_4096": [(4096, 2048)],
}
SHORT = ("4x2048", "32x256", "4x8192")  # without --tune
Launch = Callable[[int, "Case"], None]


def capability() -> int:
    """The card's, as Triton calls it."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@dataclass(frozen=True)
class Paged:
    """prefill_attention.py in one shape."""

    rows: int = 128
    tile: int = 64
    stages: int = 3
    warps: int = 8
    page: int = PAGE

    def build(self, repeat: int) -> tuple[TritonKernel, Launch]:
        b, i = "*bf16", "*i32"
        kernel = TritonKernel(
            "prefill_attention.prefill_attention", [b, b, i, i, i, b, "fp32"], capability(), warps=self.warps, pdl=False,
            WIDTH=WIDTH, KV_HEADS=KV_HEADS, R=repeat, RP=repeat,
            D=D, DP=D, PAGE=self.page, ROWS=self.rows, TILE=self.tile, STAGES=self.stages, WINDOW=0, SOFTCAP=0, kv_scales=None,
        )  # fmt: skip

        def launch(stream: int, case: Case) -> None:
            kernel(stream, (KV_HEADS, len(case.tiles)), case.qkv.data_ptr(), case.cache.data_ptr(), *case.pointers, SCALE)

        return kernel, launch


@dataclass(frozen=True)
class Hopper:
    """prefill_hopper.py in one shape."""

    tile: int = HOPPER_TILE
    stages: int = HOPPER_STAGES
    turns: int = HOPPER_TURNS
    stays: bool = True  # as many blocks as there are SMs, or one an item
    page: int = PAGE
    rows: int = prefill_hopper.ROWS

    def build(self, repeat: int) -> tuple[TritonKernel, Launch]:
        b, i = "*bf16", "*i32"
        boxes = Boxes(b, box(self.page, self.tile))
        kernel = TritonKernel(
            "prefill_hopper.prefill_attention_hopper", [boxes, b, i, i, i, b, "fp32", "i32"], 90, warps=4, pdl=False,
            WIDTH=WIDTH, KV_HEADS=KV_HEADS, R=repeat, D=D, PAGE=self.page, TILE=self.tile, STAGES=self.stages, TURNS=self.turns,
        )  # fmt: skip
        most = torch.cuda.get_device_properties("cuda").multi_processor_count if self.stays else 1 << 20

        def launch(stream: int, case: Case) -> None:
            cache = tensor_map(case.cache.data_ptr(), case.cache.numel() // D, D, boxes.box)
            number = len(case.tiles)
            kernel(stream, (min(most, KV_HEADS * number), 1), *cache, case.qkv.data_ptr(), *case.pointers, SCALE, number)

        return kernel, launch


VARIANTS = (
    Paged(),
    Paged(tile=32),
    Hopper(64, 4, turns=1),
    Hopper(64, 4, turns=0),
    Hopper(128, 3, turns=1),
    Hopper(128, 2, turns=1),
    Hopper(128, 2, turns=0),
    Hopper(64, 4, turns=1, stays=False),
    Hopper(64, 4, turns=1, page=64),
)


class Case:
    """One step's rows: tensors as the kernels take them."""

    def __init__(self, rows: list[tuple[int, int]], repeat: int, tile_rows: int, page: int) -> None:
        self.rows, self.repeat, self.heads, self.page = rows, repeat, KV_HEADS * repeat, page
        lengths = [prefix + tokens for prefix, tokens in rows]
        offsets = list(itertools.accumulate((tokens for _, tokens in rows), initial=0))
        pages = [-(-n // page) for n in lengths]
        order = torch.randperm(sum(pages), device="cuda", dtype=torch.int32)
        self.table = torch.zeros(len(rows), WIDTH, dtype=torch.int32, device="cuda")
        for row, mine in zip(self.table, order.split(pages), strict=True):
            row[: len(mine)] = mine
        self.cache = torch.randn(sum(pages), 2, KV_HEADS, page, D, device="cuda").bfloat16()
        self.qkv = torch.randn(offsets[-1], (self.heads + 2 * KV_HEADS) * D, device="cuda").bfloat16()
        self.out = torch.empty(offsets[-1], self.heads * D, device="cuda", dtype=torch.bfloat16)
        about = [[i, prefix, tokens, 0, offsets[i], 0, 0, 0] for i, (prefix, tokens) in enumerate(rows)]
        tiles = [[i, t] for i, (_, tokens) in enumerate(rows) for t in range(0, tokens, tile_rows // repeat)]
        tiles.sort(key=lambda tile: -(rows[tile[0]][0] + tile[1]))  # longest first, as `DeviceState` has them
        self.about, self.tiles = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (about, tiles))
        self.pointers = [t.data_ptr() for t in (self.table, self.tiles, self.about, self.out)]
        self.flops = sum(4 * self.heads * D * (tokens * prefix + tokens * (tokens + 1) / 2) for prefix, tokens in rows)

        self.want = self._want()

    def _want(self) -> torch.Tensor:
        """Torch's output of the last row."""
        prefix, tokens = self.rows[-1]
        length = prefix + tokens
        kv = self.cache[self.table[len(self.rows) - 1, : -(-length // self.page)].long()]
        k, v = kv.permute(1, 2, 0, 3, 4).reshape(2, KV_HEADS, -1, D)[:, None, :, :length]
        q = self.qkv[-tokens:, : self.heads * D].view(1, tokens, self.heads, D).transpose(1, 2)
        seen = torch.ones(tokens, length, dtype=torch.bool, device="cuda").tril(prefix)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return want[0].transpose(0, 1).reshape(tokens, -1).double()

    def error(self) -> float:
        return float((self.out[-len(self.want) :].double() - self.want).norm() / self.want.norm())


def prefill_rows(repeats: tuple[int, ...], tune: bool, stream: torch.cuda.Stream) -> dict[str, float]:
    """Print every case, of all variants with `tune`, best first; microseconds of the best."""
    found = {}
    variants = VARIANTS if tune else (Paged(), Hopper())
    all_built = {repeat: [(variant, *variant.build(repeat)) for variant in variants] for repeat in repeats}  # compiled side by side
    for repeat, built in all_built.items():
        for name in CASES if tune else SHORT:
            results = []
            cases = {kind: Case(CASES[name], repeat, *kind) for kind in {(variant.rows, variant.page) for variant in variants}}
            for variant, kernel, launch in built:
                case = cases[variant.rows, variant.page]
                case.out.fill_(math.nan)
                torch.cuda.synchronize()
                launch(stream.cuda_stream, case)
                torch.cuda.synchronize()
                error = case.error()
                us = graph_time(lambda _: launch(stream.cuda_stream, case), 8, stream, 7)  # noqa: B023
                spills = f" SPILLS {kernel.local_bytes}" if kernel.local_bytes else ""
                what = f"{variant} {case.flops / us / 1e6:.0f} TF/s [{kernel.registers}{spills}] error {error:.1e}"
                results.append((us, what))
            results.sort()
            found[f"attention_prefill_{name}_us"] = results[0][0]
            print(f"prefill {name} heads {8 * repeat}:", *(f"\n    {us:.0f} us {what}" for us, what in results), flush=True)
    return found
