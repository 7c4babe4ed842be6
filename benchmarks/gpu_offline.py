"""TARGETS' first table through the three real processes: token ids in, text out, by the offline API.

    python -m benchmarks.gpu_offline --shape qwen3-0.6b [--rows start,w1,steps,long,shared] [--json OUT] [--set KEY=VALUE …] [--end TEXT]

This program is the frontend; scheduler and worker are processes that it starts. Weights are random, prompts too, EOS is
ignored; a figure is the median of `--runs` after a warm-up. `start`: from the start of a fresh program to its first token.
`w1` cold: the first run after one prompt, each time with services started anew; warm: the same prompts once more.
`--shape tiny --set device=cpu --quick` shows on any machine that it runs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_results import add_rows, card
from benchmarks.gpu_shapes import model_folder
from frontend.llm import LLM
from frontend.offline import SamplingParams

ROWS = ("start", "w1", "steps", "long", "shared")
NOTE = "offline API, scheduler and worker as three processes, random weights; medians of {} runs"
FIRST_TOKEN = """
import ast, sys, time
from frontend.llm import LLM
from frontend.offline import SamplingParams
with LLM(sys.argv[1], **ast.literal_eval(sys.argv[2])) as llm:
    llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    print(time.monotonic())
"""


@dataclass(frozen=True)
class Sizes:
    """How much each row asks for; the defaults are the table's."""

    requests: int = 256
    shortest: int = 100  # tokens of W1's prompts and outputs
    longest: int = 1024
    batches: tuple[int, ...] = (1, 8, 64)
    step_tokens: int = 256
    long_prompts: int = 32
    long_length: int = 3584
    long_tokens: int = 128
    prefix: int = 2048
    shared_tokens: int = 64


QUICK = Sizes(8, 10, 40, (1, 4), 16, 4, 200, 8, 128, 8)


class Bench:
    """The rows, each a method that returns {row: figures of the runs}."""

    def __init__(self, model: str, settings: dict[str, Any], sizes: Sizes, runs: int) -> None:
        self.model, self.settings, self.sizes, self.runs = model, {"load_format": "dummy", **settings}, sizes, runs
        self.random = random.Random(1)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return [[self.random.randint(0, 10000) for _ in range(length)] for _ in range(count)]

    def seconds(self, llm: LLM, prompts: list[list[int]], lengths: int | Sequence[int], temperature: float = 0.0) -> float:
        """Wall time of one `generate`. Raises SystemExit if a token is missing."""
        every = [lengths] * len(prompts) if isinstance(lengths, int) else list(lengths)
        params = [SamplingParams(max_tokens=n, temperature=temperature, ignore_eos=True, seed=i) for i, n in enumerate(every)]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - began
        if [len(output.outputs[0].token_ids) for output in outputs] != every:
            raise SystemExit("an output has not the length that was asked for")
        return took

    def start(self) -> dict[str, list[float]]:
        """From the start of a fresh program to its first token."""
        took = []
        for _ in range(self.runs):
            began = time.monotonic()
            command = [sys.executable, "-c", FIRST_TOKEN, self.model, repr(self.settings)]
            took.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) - began)
        return {"start_s": took}

    def w1_requests(self) -> tuple[list[list[int]], list[int]]:
        """Prompts and output lengths of 100 to 1,024 tokens."""
        s, draw = self.sizes, random.Random(0)
        prompts = [[draw.randint(0, 10000) for _ in range(draw.randint(s.shortest, s.longest))] for _ in range(s.requests)]
        return prompts, [draw.randint(s.shortest, s.longest) for _ in range(s.requests)]

    def w1(self) -> dict[str, list[float]]:
        """Many requests of ragged lengths at once, temperature 0.6."""
        prompts, lengths = self.w1_requests()
        rates: dict[str, list[float]] = {"w1_cold_tok_s": [], "w1_warm_tok_s": []}
        for _ in range(self.runs):
            with LLM(self.model, **self.settings) as llm:
                self.seconds(llm, [[1, 2, 3, 4]], 1)
                for found in rates.values():
                    found.append(sum(lengths) / self.seconds(llm, prompts, lengths, 0.6))
        return rates

    def steps(self, llm: LLM) -> dict[str, list[float]]:
        """Batches of prompts of 128 ids, cached after the first run; milliseconds a step."""
        found = {}
        for batch in self.sizes.batches:
            prompts = self.prompts(batch, 128)
            walls = [self.seconds(llm, prompts, self.sizes.step_tokens) for _ in range(1 + self.runs)]
            found[f"step_b{batch}_ms"] = [wall / self.sizes.step_tokens * 1e3 for wall in walls[1:]]
        return found

    def long(self, llm: LLM) -> dict[str, list[float]]:
        """Long prompts: prefill cold, decode over the cached prompts."""
        s = self.sizes
        prefill = []
        for _ in range(1 + self.runs):
            prompts = self.prompts(s.long_prompts, s.long_length)
            prefill.append(s.long_prompts * s.long_length / self.seconds(llm, prompts, 1))
        decode = []
        for _ in range(1 + self.runs):
            one, many = (self.seconds(llm, prompts, n) for n in (1, s.long_tokens + 1))
            decode.append((many - one) / s.long_tokens * 1e3)
        return {"prefill_tok_s": prefill[1:], "long_decode_ms": decode[1:]}

    def shared(self, llm: LLM) -> dict[str, list[float]]:
        """Prompts of one prefix, which is new in each run, and 64 ids of their own."""
        s, rates = self.sizes, []
        for _ in range(1 + self.runs):
            (prefix,) = self.prompts(1, s.prefix)
            prompts = [prefix + own for own in self.prompts(s.requests, 64)]
            rates.append(s.requests / self.seconds(llm, prompts, s.shared_tokens))
        return {"shared_prefix_req_s": rates[1:]}


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE as a setting of LLM: a number where it is one."""
    key, _, value = text.partition("=")
    return key, int(value) if value.isdecimal() else {"true": True, "false": False}.get(value, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="a shape of gpu_shapes.py, or a folder with config.json and a tokenizer")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few short prompts: the figures mean nothing")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="a setting of scheduler or worker")
    parser.add_argument("--end", default="", metavar="TEXT", help="ends the rows' names in the file, where settings are not the usual ones")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = args.rows.split(",")
    if not set(rows) <= set(ROWS):
        parser.error(f"--rows {args.rows}: some of {','.join(ROWS)}")
    print(f"{Path(args.shape).name} on {card()}", flush=True)
    settings, end = dict(args.set), args.end
    name, note = Path(args.shape).name, NOTE.format(args.runs) + (", quick: no figure means anything" if args.quick else "")

    def say(found: dict[str, list[float]]) -> None:
        for row, figures in found.items():
            print(f"{row:24s} {statistics.median(figures):12.4g}   {' '.join(f'{figure:.5g}' for figure in figures)}", flush=True)
        if args.json:
            medians = {row + end: round(statistics.median(figures), 4) for row, figures in found.items()}
            add_rows(args.json, name, medians, f"gpu_offline{end}", note)

    with model_folder(args.shape) as folder:
        bench = Bench(str(folder), settings, QUICK if args.quick else Sizes(), args.runs)
        for alone in (bench.start, bench.w1):
            if alone.__name__ in rows:
                say(alone())
        together: list[Callable[[LLM], dict[str, list[float]]]] = [bench.steps, bench.long, bench.shared]
        if any(row.__name__ in rows for row in together):
            with LLM(str(folder), **bench.settings) as llm:
                for row in together:
                    if row.__name__ in rows:
                        say(row(llm))


if __name__ == "__main__":
    main()
