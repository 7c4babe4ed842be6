"""A worker's memory on a card: the blocks that it finds room for beside those planned, what graphs take, and what is in use at the end.

    python -m benchmarks.gpu_memory --shape qwen3-0.6b [--utilization 0.9] [--json OUT]

Random weights, nothing else on the card. The worker is started as usual (it runs its largest step and takes the rest for blocks), captures
every graph that it captures while idle, and runs the largest step three times more; then as much may be in use as the share says.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import torch

from benchmarks.gpu_results import add_rows, card
from benchmarks.gpu_shapes import model_folder
from gpu_worker.cuda.loading import load_engine
from gpu_worker.settings import WorkerSettings
from gpu_worker.worst_case import worst_step
from pagewire.plan import Setup, room

NOTE = "blocks found and planned, MiB of all graphs captured while idle, MiB in use after them and the largest step, and of the share"


def in_use() -> int:
    """Bytes of the card, whoever has them."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="a shape of gpu_shapes.py, or a folder with config.json and a tokenizer")
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG, format="%(relativeCreated)7d ms %(message)s")
    print(f"{Path(args.shape).name} on {card()}", flush=True)
    with model_folder(args.shape) as folder:
        settings = WorkerSettings(
            Path("unused"), model=str(folder), load_format="dummy", device="cuda", gpu_memory_utilization=args.utilization
        )
        engine, _ = load_engine(settings)
        engine.forward.attention.wait()
        total = torch.cuda.mem_get_info()[1]
        planned = room(folder, total, Setup(gpu_memory_utilization=args.utilization)).blocks
    started = in_use()
    while engine.idle(lambda: False):
        pass
    graphs = in_use() - started
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        engine.start(worst_step(engine.geometry))
        engine.finish()
        seconds.append(time.perf_counter() - began)
    found = {
        "memory_blocks": engine.geometry.blocks,
        "memory_blocks_planned": planned,
        "memory_graphs_mib": graphs >> 20,
        "memory_in_use_mib": in_use() >> 20,
        "memory_share_mib": int(args.utilization * total) >> 20,
    }
    print(json.dumps(found), f"{len(engine.graphs.captured)} graphs; the largest step takes {min(seconds):.3f} s once loaded")
    if args.json:
        add_rows(args.json, Path(args.shape).name, found, "gpu_memory", NOTE)


if __name__ == "__main__":
    main()
