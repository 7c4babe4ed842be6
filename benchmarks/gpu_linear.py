"""Which cut of linear.cu is fastest for each matrix of the two shapes: a chain of nodes under PDL in a CUDA graph, weights beyond L2.

python -m benchmarks.gpu_linear [--shape qwen3-0.6b] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gpu_worker.cuda.linears import Cut, LinearKernel, best_cut, cuts

SHAPES = {
    "qwen3-0.6b": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072), "head": (151936, 1024)},
    "llama-3.1-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)},
}
ROLES: dict[str, dict[str, bool]] = {
    "qkv": {"norm": True}, "o": {"residual": True}, "gate_up": {"norm": True, "silu": True}, "down": {"residual": True}, "head": {},
}  # fmt: skip


def chain_time(kernel: LinearKernel, weights: torch.Tensor, tokens: int, stream: torch.cuda.Stream) -> float:
    """Microseconds per node; weights [copies, n, k]."""
    copies, n, k = weights.shape
    nodes = max(copies, 2 * math.ceil(30 / copies) * copies if n * k < 1 << 26 else copies)
    a, b = (torch.randn(16, max(n, k), device="cuda").bfloat16() for _ in range(2))

    def body() -> None:
        for i in range(nodes):
            kernel(stream.cuda_stream, weights[i % copies].data_ptr(), a.data_ptr(), b.data_ptr(), 0, b.data_ptr(), tokens)

    with torch.cuda.stream(stream):
        body()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        body()
        graph.capture_end()
        times = []
        for i in range(6):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i:
                times.append(start.elapsed_time(end) * 1e3 / nodes)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--json")
    args = parser.parse_args()
    properties = torch.cuda.get_device_properties(0)
    sms = properties.multi_processor_count
    stream = torch.cuda.Stream()
    out: dict[str, object] = {"card": properties.name, "rows": {}}
    for shape in args.shape or SHAPES:
        for role, (n, k) in SHAPES[shape].items():
            normed = bool(ROLES[role].get("norm"))
            weights = torch.empty(max(2, min(40, math.ceil(160e6 / (2 * n * k)))), n, k, device="cuda", dtype=torch.bfloat16).normal_(
                0, k**-0.5
            )
            found = [c for c in cuts(n, k, normed, sms) if c.loads >= 8 and c.clusters * c.split >= 60 and c.warps >= 4]
            torch.cuda.current_blas_handle()

            def build(cut: Cut) -> LinearKernel:
                torch.cuda.set_device(0)
                torch.cuda.current_blas_handle()
                return LinearKernel(cut, "sm_90a", 1e-6, **ROLES[role])  # noqa: B023

            with ThreadPoolExecutor(16) as pool:
                kernels = list(pool.map(build, found))
            default = best_cut(n, k, normed, sms)
            for tokens in (1, 8, 16):
                results = sorted((chain_time(kernel, weights, tokens, stream), i) for i, kernel in enumerate(kernels))
                ideal = 2 * n * k / 3.2e6
                cells = []
                for us, i in results[:3]:
                    c = found[i]
                    cells.append(
                        f"{us:.2f} ({c.groups},{c.warps},{c.split},{c.clusters},{c.per_sm})[{kernels[i]._kernels[tokens > 8].registers}]"
                    )
                own = next((us for us, i in results if found[i] == default), math.nan)
                print(f"{shape} {role} M={tokens}: ideal {ideal:.1f} default {own:.2f} best {' '.join(cells)}", flush=True)
                out["rows"][f"{shape} {role} {tokens}"] = [(us, str(found[i])) for us, i in results]  # type: ignore[index]
            del weights
    if args.json:
        Path(args.json).write_text(json.dumps(out))


if __name__ == "__main__":
    main()
