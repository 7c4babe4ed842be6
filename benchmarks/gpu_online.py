"""TARGETS' second table: the three processes behind HTTP, asked as users would, on the machine with the card.

    python -m benchmarks.gpu_online --shape qwen3-0.6b --rate 32 [--runs 3] [--json OUT] [--frontends 4 …]

Weights are random. Each run starts `pagewire up` anew, so that its first load is
cold: one request at a time, then all at once, the same again (cached), then the first seconds' worth at the given rate. Rows
are medians over the runs. Options that are not this script's go to `pagewire up`.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ending import end_in_order
from benchmarks.gpu_results import add_rows
from benchmarks.gpu_shapes import model_folder

LENGTHS = Path(__file__).parent / "data" / "sharegpt_lengths.json"


class Stack:
    """`pagewire up` in a run directory of its own; `seconds` from start to ready."""

    def __init__(self, model: Path, extra: list[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pagewire-online-")
        self._log = Path(self._folder.name) / "up.log"
        command = [sys.executable, "-m", "pagewire", "up", "--model", str(model), "--load-format", "dummy", "--port", "0"]
        began = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen([*command, "--run-dir", f"{self._folder.name}/run", *extra], stdout=log, stderr=log)
        self.url = self._wait()
        self.seconds = time.perf_counter() - began

    def _wait(self) -> str:
        for _ in range(3000):
            for line in self._log.read_text().splitlines():
                if line.startswith("ready: "):
                    return line.split()[1] + "/v1"
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        self.close()
        raise SystemExit("pagewire up did not become ready")

    def close(self) -> None:
        """End it, gently first; its log goes to stderr if it failed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.returncode:
            sys.stderr.write(self._log.read_text())
        self._folder.cleanup()


def load(url: str, lengths: Path, *options: str) -> list[dict[str, Any]]:
    """The runs of one load."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.http_load",
            "--url",
            url,
            "--lengths",
            str(lengths),
            "--ignore-eos",
            "--json",
            str(out),
        ]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        runs: list[dict[str, Any]] = json.loads(out.read_text())["runs"]
    if any(run["failed"] for run in runs):
        raise SystemExit(f"requests failed: {[run['errors'] for run in runs]}")
    return runs


def measure(stack: Stack, args: argparse.Namespace) -> dict[str, float]:
    """All rows of one fresh stack."""
    ids = ("--vocab", str(args.vocab))
    many = ("--processes", str(args.processes), "--num-prompts", str(args.requests), *ids)
    one = ("--processes", "1", "--num-prompts", str(args.alone), "--concurrency", "1", "--seed", "1", *ids)
    (alone,) = load(stack.url, args.lengths, *one)
    cold, again = load(stack.url, args.lengths, *many, "--repeat", "2")
    rate = f"poisson{args.rate:g}"
    (poisson,) = load(stack.url, args.lengths, *many, "--rate", str(args.rate), "--seconds", str(args.seconds))
    return {
        "start_ready_s": stack.seconds,
        "alone_ttft_ms_p50": alone["p50_ttft_ms"],
        "alone_itl_ms_p50": alone["p50_itl_ms"],
        "burst_cold_req_s": cold["request_throughput"],
        "burst_cold_output_tok_s": cold["output_throughput"],
        "burst_again_req_s": again["request_throughput"],
        "burst_again_output_tok_s": again["output_throughput"],
        **{f"{rate}_{what}_ms_{p}": poisson[f"{p}_{what}_ms"] for what in ("ttft", "tpot") for p in ("p50", "p99")},
    }


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="a shape of gpu_shapes.py, or a folder with config.json and a tokenizer")
    parser.add_argument("--lengths", type=Path, default=LENGTHS, help="(prompt, output) tokens of each request")
    parser.add_argument("--rate", type=float, default=32.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=30, help="requests one at a time")
    parser.add_argument("--processes", type=int, default=6, help="of the load generator")
    parser.add_argument("--vocab", type=int, default=10000, help="prompt ids are drawn below this")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args, extra = parser.parse_known_args()  # the rest goes to `pagewire up`
    runs = []
    with model_folder(args.shape) as folder:
        for _ in range(args.runs):
            stack = Stack(folder, extra)
            try:
                runs.append(measure(stack, args))
            finally:
                stack.close()
            print(json.dumps(runs[-1]), flush=True)
    rows = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    for name, figure in rows.items():
        print(f"{name:32s} {figure:12.2f}")
    if args.json:
        note = f"three processes behind HTTP, {args.requests} requests of {args.processes} client processes; medians of {args.runs} runs"
        add_rows(args.json, Path(args.shape).name, {name: round(figure, 3) for name, figure in rows.items()}, "gpu_online", note)


if __name__ == "__main__":
    main()
