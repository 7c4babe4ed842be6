"""Which cut of linear.cu is fastest for each matrix of the two shapes: a chain of nodes under PDL in a CUDA graph, weights beyond L2.

python -m benchmarks.gpu_linear [--shape qwen3-0.6b] [--fp8 1|128] [--json OUT]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.gpu_timing import graph_time
from gpu_worker.cuda.linears import LinearKernel, best_cut, cuts, mid_cuts

SHAPES = {
    "qwen3-0.6b": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072), "head": (151936, 1024)},
    "llama-3.1-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)},
}
ROLES: dict[str, dict[str, bool]] = {
    "qkv": {"norm": True}, "o": {"residual": True}, "gate_up": {"norm": True, "silu": True}, "down": {"residual": True}, "head": {},
}  # fmt: skip


def nodes_of(weights: torch.Tensor) -> int:
    """Enough nodes to time, every copy of the weights equally often."""
    return len(weights) * max(1, 60 // len(weights))


def chain_time(kernel: LinearKernel, weights: torch.Tensor, tokens: int, stream: torch.cuda.Stream) -> float:
    """Microseconds per node; weights [copies, n, k], in bf16 or e4m3."""
    copies, n, k = weights.shape
    scales, norm = torch.ones(-(-k // 128), n, device="cuda"), torch.ones(k, device="cuda").bfloat16()
    a, b = (torch.randn(64, max(n, k), device="cuda").bfloat16() for _ in range(2))

    def launch(i: int) -> None:
        addresses = [t.data_ptr() for t in (weights[i % copies], a)]
        kernel(stream.cuda_stream, *addresses, b.data_ptr(), 0, b.data_ptr(), tokens, scales.data_ptr(), norm.data_ptr())

    return graph_time(launch, nodes_of(weights), stream)


def mm_time(weights: torch.Tensor, tokens: int, stream: torch.cuda.Stream) -> float:
    """The same through cuBLAS, without norm, SiLU and residual."""
    copies, n, k = weights.shape
    x, y = torch.randn(tokens, k, device="cuda").bfloat16(), torch.empty(tokens, n, device="cuda").bfloat16()
    return graph_time(lambda i: torch.mm(x, weights[i % copies].t(), out=y), nodes_of(weights), stream)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--fp8", type=int, choices=(0, 1, 128), default=0, help="e4m3 weights, a scale for each row or 128 columns of it")
    parser.add_argument("--json")
    args = parser.parse_args()
    properties = torch.cuda.get_device_properties(0)
    sms = properties.multi_processor_count
    stream = torch.cuda.Stream()
    rows: dict[str, object] = {}
    for shape in args.shape or SHAPES:
        for role, (n, k) in SHAPES[shape].items():
            if args.fp8 and role == "head":
                continue
            normed = bool(ROLES[role].get("norm"))
            weights = torch.empty(max(2, min(40, math.ceil(160e6 / (2 * n * k)))), n, k, device="cuda", dtype=torch.bfloat16).normal_(
                0, k**-0.5
            )
            torch.cuda.current_blas_handle()
            least = 4 if args.fp8 else 8
            few = [c for c in cuts(n, k, normed, sms, args.fp8) if c.loads >= least and c.clusters * c.split >= 60 and c.warps >= 4]
            mid = [c for c in mid_cuts(n, k, sms) if c.clusters * c.split >= 60 and c.loads >= 8] if role != "head" else []
            factor = weights.to(torch.float8_e4m3fn) if args.fp8 else weights
            for tokens in args.tokens or ((1, 8, 16) if args.fp8 else (1, 8, 16, 32, 64)):
                found = few if tokens <= 16 else mid

                def build(i: int) -> LinearKernel:
                    torch.cuda.set_device(0)
                    torch.cuda.current_blas_handle()
                    cut = (None, found[i]) if tokens > 16 else (found[i], None)  # noqa: B023
                    return LinearKernel(*cut, "sm_90a", 1e-6, **ROLES[role])  # noqa: B023

                with ThreadPoolExecutor(16) as pool:
                    kernels = list(pool.map(build, range(len(found))))
                results = sorted((chain_time(kernel, factor, tokens, stream), i) for i, kernel in enumerate(kernels))
                cells = []
                for us, i in results[:4]:
                    registers = next(kernel.registers for most, kernel, _ in kernels[i].kernels if tokens <= most)
                    cells.append(f"{us:.2f} {dataclasses.astuple(found[i])[2:]}[{registers}]")
                default = best_cut(n, k, normed, sms, args.fp8)
                own = next((us for us, i in results if found[i] == default), math.nan)
                library = mm_time(weights, tokens, stream)
                ideal = factor.element_size() * n * k / 3.2e6
                print(
                    f"{shape} {role} M={tokens}: ideal {ideal:.1f} mm {library:.2f} default {own:.2f} best {' '.join(cells)}",
                    flush=True,
                )
                rows[f"{shape} {role} {tokens}"] = {"mm": library, "cuts": [(us, str(found[i])) for us, i in results]}
            del weights, factor
    if args.json:
        Path(args.json).write_text(json.dumps({"card": properties.name, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
