"""`pagewire plan` beside what a worker takes on a card: torch's allocator at its peak, over the steps that take most.

    python -m benchmarks.gpu_plan --shape qwen3-0.6b [--blocks 2000] [--json OUT]

Random weights, a given number of blocks (with all that fit, the cache would hide an error in everything else). The steps: a
prefill of the largest step, a decode step of as many rows as run at once, all with filters, penalties and log probabilities.
What lies outside the allocator (the driver's context, kernels, graphs) is printed beside the plan's `overhead`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_player import Player
from benchmarks.gpu_results import add_rows
from benchmarks.gpu_shapes import model_folder
from gpu_worker.cuda.loading import load_engine
from gpu_worker.settings import WorkerSettings
from pagewire.plan import Setup, estimate_memory

SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01, "frequency_penalty": 0.1, "logprobs": 5}
NOTE = "torch's allocator at its peak with {} blocks, the plan's total over it less 1, and MiB outside the allocator"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="a shape of gpu_shapes.py, or a folder with config.json and a tokenizer")
    parser.add_argument("--blocks", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with model_folder(args.shape) as folder:
        before, _ = torch.cuda.mem_get_info()  # makes the context
        engine, _ = load_engine(
            WorkerSettings(run_dir=Path("unused"), model=str(folder), load_format="dummy", device="cuda", num_gpu_blocks=args.blocks)
        )
        memory = estimate_memory(folder, Setup())
    geometry, rng = engine.geometry, np.random.default_rng(0)
    player = Player(engine)
    length = geometry.max_step_tokens // geometry.slots
    new = [player.add(rng.integers(0, 1000, length, dtype=np.int32), 6, **SAMPLING) for _ in range(geometry.slots)]
    player.prefill(new)
    player.decode([sequence for sequence, _ in new], 4)
    player.settle()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
    outside = before - torch.cuda.mem_get_info()[0] - reserved
    planned = memory.total(args.blocks)
    found = {
        "plan_measured_mib": peak >> 20,
        "plan_planned_mib": planned >> 20,
        "plan_error": round(planned / peak - 1, 4),
        "plan_outside_mib": outside >> 20,
    }
    print(json.dumps(found), f"overhead planned {memory.overhead >> 20} MiB, reserved by the allocator {reserved >> 20} MiB")
    if args.json:
        add_rows(args.json, Path(args.shape).name, found, "gpu_plan", NOTE.format(args.blocks))


if __name__ == "__main__":
    main()
