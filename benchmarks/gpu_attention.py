"""Paged decode attention alone, TARGETS' third table: many calls in one CUDA graph under PDL, KV rotated beyond L2.

    python -m benchmarks.gpu_attention [--shape qwen3-0.6b] [--tune] [--json OUT]

bf16, 8 KV heads of 128 (under 16 query heads, or 32 for llama-3.1-8b), pages of 16 in random order; a call also normalises
and rotates q and k and writes K and V of the new token, which the peers' kernels do elsewhere. Each case is checked against
float64 first. Prefill is `gpu_prefill.py`'s.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_prefill import capability, prefill_rows
from benchmarks.gpu_results import add_rows
from benchmarks.gpu_timing import graph_time
from gpu_worker.cuda.state import least_tiles
from gpu_worker.cuda.triton_kernel import TritonKernel

CASES = ((1, 256), (1, 1024), (1, 8192), (8, 256), (8, 1024), (64, 256), (64, 1024), (256, 800), (32, 4096), (4, 32768))
KV_HEADS, D, PAGE, TILE = 8, 128, 16, 64
REPEATS = {"qwen3-0.6b": 2, "llama-3.1-8b": 4}  # query heads of a KV head
NOTE = "the kernels alone; decode in a CUDA graph with KV rotated beyond L2, rotation and cache write included; medians of 6"


def work_list(lengths: list[int], least: int, spread: int, most: int = 16) -> np.ndarray:
    """The work list of `prepare` (kernels/plan.cu) for rows with so many cached tokens; slot i is row i."""
    tiles = [max(-(-n // TILE), 1) for n in lengths]
    chunk = min(max(least, -(-sum(tiles) // spread)), most)
    items: list[tuple[int, ...]] = []
    for row, (n, t) in enumerate(zip(lengths, tiles, strict=True)):
        share = -(-t // -(-t // chunk))
        splits, first = -(-t // share), len(items)
        for i in range(splits):
            items.append((row, min(i * share * TILE, n), min((i + 1) * share * TILE, n), splits, len(items), first, row, n))
    return np.array(items, np.int32)


class Case:
    """One batch and context: tensors, several copies of the cache."""

    def __init__(self, batch: int, context: int, repeat: int) -> None:
        self.batch, self.context, self.repeat = batch, context, repeat
        size = batch * context * KV_HEADS * D * 4
        self.copies = max(1, min(40, math.ceil(160e6 / size)))
        self.width = context // PAGE + 1
        pages = batch * self.width
        self.cache = torch.randn(self.copies, pages, 2, KV_HEADS, PAGE, D, device="cuda", dtype=torch.bfloat16)
        self.table = torch.randperm(pages, device="cuda", dtype=torch.int32).view(batch, self.width).contiguous()
        self.qkv = torch.randn(batch, (KV_HEADS * repeat + 2 * KV_HEADS) * D, device="cuda").bfloat16()
        self.out = torch.empty(batch, KV_HEADS * repeat * D, device="cuda", dtype=torch.bfloat16)
        self.norm = torch.rand(D, device="cuda").bfloat16()
        angle = torch.rand(context + 1, D // 2, device="cuda")
        self.cos, self.sin = angle.cos(), angle.sin()
        self.bytes = size

    def launch(self, kernel: TritonKernel, items: torch.Tensor, work: tuple[torch.Tensor, ...], copy: int, stream: int) -> None:
        kernel(
            stream,
            (KV_HEADS, len(items)),
            *(
                t.data_ptr()
                for t in (self.qkv, self.cache[copy], self.table, items, self.out, *work, self.norm, self.norm, self.cos, self.sin)
            ),
            D**-0.5 * math.log2(math.e),
            1e-6,
        )

    def want(self) -> torch.Tensor:
        """float64."""
        b, n = self.batch, self.context

        def turned(x: torch.Tensor) -> torch.Tensor:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm.double()
            p, q = x.chunk(2, -1)
            c, s = self.cos[n].double(), self.sin[n].double()
            return torch.cat((p * c - q * s, q * c + p * s), -1)

        q, k, v = self.qkv.double().view(b, -1, D).split((KV_HEADS * self.repeat, KV_HEADS, KV_HEADS), 1)
        out = []
        for i in range(b):  # a row at a time: float64 of all is too much
            kv = self.cache[0, self.table[i].long()].double().permute(1, 2, 0, 3, 4).reshape(2, KV_HEADS, -1, D)[:, :, :n]
            keys = torch.cat((kv[0], turned(k[i])[:, None]), 1)
            values = torch.cat((kv[1], v[i][:, None]), 1)
            scores = torch.einsum("hrd,hnd->hrn", turned(q[i]).view(KV_HEADS, self.repeat, D), keys) * D**-0.5
            out.append(torch.einsum("hrn,hnd->hrd", scores.softmax(-1), values).reshape(-1))
        return torch.stack(out)


def measure(case: Case, kernel: TritonKernel, least: int, spread: int, stream: torch.cuda.Stream) -> tuple[float, float]:
    """Microseconds per call and relative error."""
    items = torch.tensor(work_list([case.context] * case.batch, least, spread), device="cuda")
    padded = 1 << (case.repeat - 1).bit_length()
    work = (
        torch.empty(len(items), KV_HEADS, padded, D, device="cuda"),
        torch.empty(len(items), KV_HEADS, 2, padded, device="cuda"),
        torch.zeros(case.batch, KV_HEADS, dtype=torch.int32, device="cuda"),
    )
    case.out.fill_(float("nan"))
    torch.cuda.synchronize()
    case.launch(kernel, items, work, 0, stream.cuda_stream)
    torch.cuda.synchronize()
    want = case.want()
    error = float((case.out.double() - want).norm() / want.norm())
    nodes = max(case.copies, 40 // case.copies * case.copies)
    us = graph_time(lambda i: case.launch(kernel, items, work, i % case.copies, stream.cuda_stream), nodes, stream, 7)
    return us, error


def decode_rows(repeats: tuple[int, ...], tune: bool, stream: torch.cuda.Stream) -> dict[str, float]:
    """Print every decode case; microseconds of each."""
    rows = {}
    for (batch, context), repeat in itertools.product(CASES, repeats):
        case = Case(batch, context, repeat)
        variants = list(itertools.product((1, 2, 4) if batch < 64 else (4,), (33, 50))) if tune else [(least_tiles(batch), 33)]
        b, i, f = "*bf16", "*i32", "*fp32"
        kernel = TritonKernel(
            "decode_attention.decode_attention", [b, b, i, i, b, f, f, i, b, b, f, f, "fp32", "fp32"], capability(), warps=4, pdl=True,
            WIDTH=case.width, KV_HEADS=KV_HEADS, R=repeat, RP=repeat, D=D, DP=D, PAGE=PAGE, TILE=TILE, STAGES=2,
            WINDOW=0, SOFTCAP=0, QK_NORM=1, PDL=1, kv_scales=None,
        )  # fmt: skip
        results = sorted((*measure(case, kernel, least, spread, stream), f"m{least}c{spread}") for least, spread in variants)
        us, _, what = results[0]
        rows[f"attention_{batch}x{context}_us"] = us
        print(
            f"{batch} x {context} heads {8 * repeat}: {us:.2f} us {what}[{kernel.registers}] {case.bytes / us / 1e6:.2f} TB/s "
            f"error {max(error for _, error, _ in results):.1e} | " + " ".join(f"{what} {us:.2f}" for us, _, what in results[1:]),
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(REPEATS), help="one model's query heads; without it those of all are printed")
    parser.add_argument("--tune", action="store_true", help="work lists and kernels of several shapes")
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--json", type=Path, help="needs --shape")
    args = parser.parse_args()
    if args.json and not args.shape:
        parser.error("--json: the file is one shape's: name it with --shape")
    stream = torch.cuda.Stream()
    repeats = (REPEATS[args.shape],) if args.shape else tuple(REPEATS.values())
    rows: dict[str, float] = {}
    for name, work in (("decode", decode_rows), ("prefill", prefill_rows)):
        if args.only in (None, name):
            rows |= work(repeats, args.tune, stream)
    if args.json:
        add_rows(args.json, args.shape, {name: round(us, 3) for name, us in rows.items()}, "gpu_attention", NOTE)


if __name__ == "__main__":
    main()
