"""Where a decode step's time goes: torch's profiler over replays of one bucket, kernel by kernel.

    python -m benchmarks.gpu_profile --shape FOLDER --batch 1,8,64 [--context 256] [--json OUT]

A kernel's share goes from the end of the one before to its own end: under PDL kernels overlap, and a duration holds the wait
for the predecessor. `gpu_profile_svg.py` draws the rows.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_results import add_rows
from benchmarks.gpu_runner import Bench
from gpu_worker.cuda.engine import Engine
from gpu_worker.cuda.memory import Options
from gpu_worker.cuda.weights import UnreadWeights
from gpu_worker.loading.config import from_json
from gpu_worker.loading.dummy import DummyTensors
from gpu_worker.loading.source import Shard

PARTS = {  # and the beginnings of their kernels' names; what is none of them is a linear's
    "attention": ("decode_", "prefill_attention"),
    "linears": (),
    "head": (),
    "norms": ("rms_norm", "silu_mul", "rotate_and_store"),  # of more than 64 rows, where they are kernels of their own
    "sampler": ("sample",),
    "prepare": ("prepare", "expand", "embed", "mark"),
}
Span = tuple[float, float, str]


def spans_of(profile: torch.profiler.profile) -> list[Span]:
    """Kernels in the order of their starts; microseconds."""
    events = [e for e in profile.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    return sorted((e.time_range.start, e.time_range.end, e.name) for e in events)


def shares(spans: Sequence[Span]) -> list[tuple[str, float]]:
    """(kernel, microseconds from the end of the one before to its own end)."""
    found, before = [], spans[0][0] if spans else 0.0
    for _, end, name in spans:
        found.append((name, max(0.0, end - before)))
        before = max(end, before)
    return found


def parts(spans: Sequence[Span], steps: int) -> dict[str, float]:
    """Microseconds a step of each of PARTS. The head is the linears between the last norm and the sampler."""
    total = dict.fromkeys(PARTS, 0.0)
    since_norm = 0.0
    for name, took in shares(spans):
        part = next((part for part, names in PARTS.items() if name.startswith(names)), "linears")
        total[part] += took
        if part == "linears":
            since_norm += took
        elif name.startswith("sample"):
            total["head"] += since_norm
            total["linears"] -= since_norm
        if name.startswith(("rms_norm", "sample")):
            since_norm = 0.0
    return {part: round(took / steps, 1) for part, took in total.items()}


def table(title: str, profile: torch.profiler.profile, steps: int) -> dict[str, float]:
    """Print where the time of so many steps went, kernel by kernel, and return it by parts."""
    spans = spans_of(profile)
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, took in shares(spans):
        by_name[name.split("(")[0][:48]].append(took)
    print(f"{title}: {sum(map(sum, by_name.values())) / steps:.1f} us a step")
    for name, values in sorted(by_name.items(), key=lambda kv: -sum(kv[1])):
        print(f"  {name:48s} {len(values) / steps:6.1f} x {sum(values) / len(values):8.2f} us = {sum(values) / steps:8.1f}")
    return parts(spans, steps)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=Path, required=True)
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = from_json(json.loads((args.shape / "config.json").read_text()))
    device = torch.device("cuda")
    unread = UnreadWeights(DummyTensors(config, 0, device, torch.bfloat16), config, device, torch.bfloat16, Shard())
    engine = Engine(config, unread, Options())
    engine.forward.attention.wait()
    bench = Bench(engine, {})
    rows: dict[str, dict[str, float]] = {}
    for batch in (int(b) for b in args.batch.split(",")):
        player = bench.player
        new = [player.add(t, 64) for t in bench.prompts(batch, args.context - 20)]
        seqs = [s for s, _ in new]
        player.prefill(new)
        player.decode(seqs, 10)
        player.settle()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(10):
                player.send([(s, 1) for s in seqs])
            player.settle()
            torch.cuda.synchronize()
        title = f"batch {batch} context {args.context}, device {player.seconds[-1] * 1e6:.1f}"
        rows[f"profile_decode_{batch}x{args.context}_us"] = table(title, profile, 10)
        player.drop(seqs)
    prompts = bench.prompts(8, 2048)
    for length in (1024, 2048):
        tokens = [t[:length] for t in prompts[: 8192 // length]]
        for _ in range(2):
            new = [bench.player.add(t, 4) for t in tokens]
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                bench.player.prefill(new)
                bench.player.settle()
                torch.cuda.synchronize()
            bench.player.drop([s for s, _ in new])
        title = f"prefill {len(tokens)} x {length}, device {bench.player.seconds[-1] * 1e6:.1f}"
        rows[f"profile_prefill_{len(tokens)}x{length}_us"] = table(title, profile, 1)
    if args.json:
        add_rows(args.json, args.shape.name, rows, "gpu_profile", "the runner in process, torch's profiler, microseconds a step by part")


if __name__ == "__main__":
    main()
