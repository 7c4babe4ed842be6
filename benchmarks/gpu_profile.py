"""Where a decode step's time goes: torch's profiler over replays of one bucket, kernel by kernel.

    python -m benchmarks.gpu_profile --shape FOLDER --batch 1,8,64 [--context 256]

Under PDL kernels overlap: a duration holds the wait for the predecessor, so the sum exceeds the step.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.gpu_runner import Bench
from gpu_worker.cuda.engine import Engine, Options
from gpu_worker.cuda.weights import load_weights
from gpu_worker.loading.config import from_json
from gpu_worker.loading.dummy import DummyTensors
from gpu_worker.loading.source import Shard


def table(title: str, profile: torch.profiler.profile, steps: int) -> None:
    """Print where the time of so many steps went: each kernel from the end of the one before to its own end."""
    events = [e for e in profile.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    shares: dict[str, list[float]] = defaultdict(list)
    before = None
    for start, end, name in spans:
        shares[name.split("(")[0][:48]].append(max(0.0, end - (before if before is not None else start)))
        before = max(end, before or 0.0)
    print(f"{title}: {sum(map(sum, shares.values())) / steps:.1f} us a step")
    for name, values in sorted(shares.items(), key=lambda kv: -sum(kv[1])):
        print(f"  {name:48s} {len(values) / steps:6.1f} x {sum(values) / len(values):8.2f} us = {sum(values) / steps:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=Path, required=True)
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--context", type=int, default=256)
    args = parser.parse_args()
    config = from_json(json.loads((args.shape / "config.json").read_text()))
    device = torch.device("cuda")
    weights = load_weights(DummyTensors(config, 0, device, torch.bfloat16), config, device, torch.bfloat16, Shard())
    bench = Bench(Engine(config, weights, Options()))
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
        table(f"batch {batch} context {args.context}, device {player.seconds[-1] * 1e6:.1f}", profile, 10)
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
        table(f"prefill {len(tokens)} x {length}, device {bench.player.seconds[-1] * 1e6:.1f}", profile, 1)


if __name__ == "__main__":
    main()
