"""The runner on a card, in process: the rows of TARGETS' first table without links, scheduler or text.

    python -m benchmarks.gpu_runner --shape SHAPE [--rows step,long,prefill,w1,shared] [--top-p P] [--no-graphs …] [--json OUT]

SHAPE is a name of `gpu_shapes.py` or a folder with config.json; weights are random. The plans come from `gpu_player.py` with
two steps in flight, so a figure holds the worker's main thread and the card, and nothing else: the goal's own figures go
through three processes. Where something is switched off, the rows have names of their own in the file: …_no_graphs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_player import Player, Sequence
from benchmarks.gpu_results import add_rows
from benchmarks.gpu_shapes import SHAPES
from gpu_worker.cuda.engine import Engine
from gpu_worker.cuda.memory import Options
from gpu_worker.cuda.weights import UnreadWeights
from gpu_worker.loading.config import from_json
from gpu_worker.loading.dummy import DummyTensors
from gpu_worker.loading.online import ROUNDED, RoundedToFp8
from gpu_worker.loading.source import Shard, TensorSource

ROWS = ("step", "long", "prefill", "w1", "shared")
SWITCHES = ("graphs", "pdl", "few", "few_fp8", "filter_kernel", "pack_prefixes", "prefill_hopper")  # of Options, all on


class Bench:
    """An engine and a player, and what they measured."""

    def __init__(self, engine: Engine, sampling: dict[str, Any]) -> None:
        """sampling: of `steps`, `long` and prefills; none is greedy."""
        self.engine, self.sampling = engine, sampling
        self.player = Player(engine)
        self.rng = np.random.default_rng(0)
        self.out: dict[str, float] = {}

    def prompts(self, count: int, length: int) -> list[np.ndarray]:
        return [self.rng.integers(0, 10000, length, dtype=np.int32) for _ in range(count)]

    def run(self, prompts: list[np.ndarray], steps: int, reuse: list[Sequence] | None = None) -> tuple[float, float, list[Sequence]]:
        """Prefill and `steps − 1` decode steps; wall seconds of all, of the prefill, and the sequences, whose blocks stay."""
        p = self.player
        start = time.perf_counter()
        new = [p.add(t, steps, reuse=reuse[i] if reuse else None, **self.sampling) for i, t in enumerate(prompts)]
        seqs = [s for s, _ in new]
        p.prefill(new)
        if steps == 1:
            p.settle()
        first = time.perf_counter() - start
        p.decode(seqs, steps - 1)
        p.settle()
        return time.perf_counter() - start, first, seqs

    def release(self, seqs: list[Sequence]) -> None:
        """Free slots and what was decoded, keep the prompts' full blocks: a prefix cache."""
        self.drop(seqs, shared=True)
        for s in seqs:
            del s.blocks[(len(s.prompt) - 1) // self.engine.geometry.block_size :]

    def drop(self, seqs: list[Sequence], shared: bool = False) -> None:
        """Free slots and blocks, except the full blocks of the prompt where they are another's."""
        for s in seqs:
            self.player.drop([s], but=(len(s.prompt) - 1) // self.engine.geometry.block_size if shared else 0)

    def steps(self) -> None:
        """Batches of B prompts of 128 ids (cached), 256 greedy tokens each."""
        for batch in (1, 8, 64):
            prompts = self.prompts(batch, 128)
            _, _, kept = self.run(prompts, 256)
            self.release(kept)
            walls, marks = [], []
            for _ in range(3):
                at = len(self.player.seconds)
                wall, _, seqs = self.run(prompts, 256, kept)
                walls.append(wall / 256 * 1e3)
                marks.append(statistics.median(self.player.seconds[at + 1 :]) * 1e3)
                self.drop(seqs, shared=True)
            self.forget(kept)
            self.out[f"step_b{batch}_ms"] = statistics.median(walls)
            self.out[f"step_b{batch}_device_ms"] = statistics.median(marks)
            self.out[f"step_b{batch}_idle_us"] = statistics.median(self.player.idle[-200:]) * 1e6
            print("  walls", [f"{w:.3f}" for w in walls], "last", self.totals(at))
            self.say(f"step_b{batch}")

    def totals(self, at: int) -> str:
        """Device and idle time since step `at`, the longest of both, in ms."""
        busy, idle = self.player.seconds[at:], self.player.idle[at:]
        return f"device {sum(busy) * 1e3:.1f} (most {max(busy) * 1e3:.2f}) idle {sum(idle) * 1e3:.1f} (most {max(idle) * 1e3:.2f})"

    def forget(self, kept: list[Sequence]) -> None:
        """Free the blocks of a prefix cache."""
        for s in kept:
            self.player.free_blocks += s.blocks

    def long(self) -> None:
        """32 prompts of 3,584 ids: prefill cold, then decode over the cached prompts."""
        prompts = self.prompts(32, 3584)
        for _ in range(2):  # the first compiles
            wall, _, kept = self.run(prompts, 1)
            self.out["prefill_tok_s"] = 32 * 3584 / wall
            self.release(kept)
            if not _:
                self.forget(kept)
        self.say("prefill")
        for _ in range(2):
            one, _, seqs = self.run(prompts, 1, kept)
            self.drop(seqs, shared=True)
            many, _, seqs = self.run(prompts, 129, kept)
            self.drop(seqs, shared=True)
            print("  one", f"{one:.4f}", "many", f"{many:.4f}", self.totals(-129))
        self.out["long_decode_ms"] = (many - one) / 128 * 1e3
        self.out["long_decode_device_ms"] = statistics.median(self.player.seconds[-100:]) * 1e3
        self.forget(kept)
        self.say("long")

    def w1(self) -> None:
        """256 prompts and outputs of 100 to 1,024 tokens, temperature 0.6; cold, then with the prompts cached."""
        random.seed(0)
        prompts = [np.array([random.randint(0, 10000) for _ in range(random.randint(100, 1024))], np.int32) for _ in range(256)]
        lengths = [random.randint(100, 1024) for _ in range(256)]
        kept: list[Sequence] = []
        p = self.player
        for name in ("first", "cold", "warm"):  # the first captures the graphs
            at, start = len(p.seconds), time.perf_counter()
            new = [
                p.add(t, n, reuse=kept[i] if name == "warm" else None, temperature=0.6)
                for i, (t, n) in enumerate(zip(prompts, lengths, strict=True))
            ]
            seqs = [s for s, _ in new]
            p.prefill(new)
            p.decode(seqs, max(lengths))
            p.settle()
            wall = time.perf_counter() - start
            if sum(len(s.tokens) for s in seqs) != sum(lengths):
                raise SystemExit("W1 lost tokens")
            self.out[f"w1_{name}_tok_s"] = sum(lengths) / wall
            print(f"  {name}: wall {wall * 1e3:.0f} ms", self.totals(at))
            if name == "cold":
                self.release(seqs)
                kept = seqs
            else:
                self.drop(seqs, shared=name == "warm")
        self.forget(kept)
        self.say("w1")

    def shared(self) -> None:
        """256 prompts of one prefix of 2,048 ids and 64 own ids, 64 tokens each; the first computes the prefix, the others share it."""
        p = self.player
        for _ in range(2):
            prefix = self.prompts(1, 2048)[0]
            prompts = [np.concatenate((prefix, own)) for own in self.prompts(256, 64)]
            start = time.perf_counter()
            first = p.add(prompts[0], 64)
            p.prefill([first])
            new = [p.add(t, 64, reuse=first[0], keep=2048) for t in prompts[1:]]
            p.prefill(new)
            seqs = [first[0], *(s for s, _ in new)]
            p.decode(seqs, 64)
            p.settle()
            self.out["shared_prefix_req_s"] = 256 / (time.perf_counter() - start)
            p.drop(seqs[:1])
            p.drop(seqs[1:], but=128)
        self.say("shared")

    def say(self, prefix: str) -> None:
        print(" ".join(f"{k}={v:.4g}" for k, v in self.out.items() if k.startswith(prefix)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--json", type=Path)
    for switch in SWITCHES:
        parser.add_argument(f"--no-{switch.replace('_', '-')}", dest=switch, action="store_false")
    parser.add_argument("--few-attention", type=int, default=Options.few_attention)
    parser.add_argument("--fp8", action="store_true", help="weights of layers in 8 bits, a scale for each row")
    parser.add_argument("--fp8-cache", action="store_true", help="keys and values in 8 bits")
    parser.add_argument("--top-p", type=float, default=1.0, help="drawn at temperature 1 instead of greedy; rows of their own, …_top_p")
    args = parser.parse_args()
    if args.top_p < 1 and {"w1", "shared"} & {*args.rows.split(",")}:
        parser.error("--top-p: the rows w1 and shared draw in their own way; leave them out of --rows")
    begin = time.perf_counter()
    config = from_json(SHAPES.get(str(args.shape)) or json.loads((args.shape / "config.json").read_text()))
    device = torch.device("cuda")
    source: TensorSource = DummyTensors(config, 0, device, torch.bfloat16)
    if args.fp8:
        source, config = RoundedToFp8(source, device), replace(config, quantization=ROUNDED)
    unread = UnreadWeights(source, config, device, torch.bfloat16, Shard())
    units = torch.tensor([[0.1, 0.1, 0.0, 0.0]] * config.layers, device=device) if args.fp8_cache else None
    switches = {name: getattr(args, name) for name in SWITCHES}
    engine = Engine(config, unread, Options(**switches, few_attention=args.few_attention), units)
    engine.forward.attention.wait()
    bench = Bench(engine, {"temperature": 1.0, "top_p": args.top_p} if args.top_p < 1 else {})
    print(
        f"{args.shape.name}: engine with its weights {time.perf_counter() - begin:.1f} s, {engine.geometry.blocks} blocks",
        flush=True,
    )
    rows = args.rows.split(",")
    for name, work in (("step", bench.steps), ("long", bench.long), ("w1", bench.w1), ("shared", bench.shared)):
        if name in rows or (name == "long" and "prefill" in rows):
            work()
    if args.json:
        note = "the runner in process with hand-made plans, no links, scheduler, frontend or text; step rows are medians of 3"
        end = "_fp8" * args.fp8 + "_fp8_cache" * args.fp8_cache + "_top_p" * (args.top_p < 1)
        end += "".join(f"_no_{name}" for name in SWITCHES if not switches[name])
        rows_found = {f"runner_{name}{end}": round(figure, 4) for name, figure in bench.out.items()}
        add_rows(args.json, args.shape.name, rows_found, f"gpu_runner{end}", note)


if __name__ == "__main__":
    main()
