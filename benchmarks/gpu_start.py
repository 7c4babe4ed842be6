"""Where the time of a start goes: from the start of a fresh program to its first token, with an empty kernel cache and with a full one.

    python -m benchmarks.gpu_start --shape qwen3-0.6b [--runs 3] [--json OUT] [--set KEY=VALUE]

The program uses the offline API, so that scheduler and worker are started by it; weights are random. The phases are those that the
worker's log names (`start: …`, of level debug), in seconds since the program was started. The first run of each row finds an empty cache,
the others what that left. `--shape tiny --set device=cpu` shows on any machine that it runs.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_offline import setting
from benchmarks.gpu_results import add_rows, card
from benchmarks.gpu_shapes import model_folder

PROGRAM = """
import ast, glob, sys, tempfile, time
from frontend.llm import LLM
from frontend.offline import SamplingParams
with LLM(sys.argv[1], **ast.literal_eval(sys.argv[2])) as llm:
    llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    ended = time.time()
    (log,) = glob.glob(tempfile.gettempdir() + "/pagewire-llm-*/logs/worker-0.log")
    print(ended, open(log).read(), sep="\\n")
"""
LINE = re.compile(r"(\S+) \w+ worker-0 worker: (started|start: .*|loaded)")
NOTE = "offline API, fresh program to first token, random weights; cold: kernel caches empty, one run; warm: median of the runs after it"


def run(model: str, settings: dict[str, Any], cache: Path) -> dict[str, float]:
    """Seconds from the program's start at which each phase had ended, in order; the last is the first token."""
    with tempfile.TemporaryDirectory(prefix="pw") as temporary:
        caches = {"PAGEWIRE_CACHE": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
        environ = os.environ | caches | {"TMPDIR": temporary, "PAGEWIRE_WORKER_LOG_LEVEL": "debug"}
        command = [sys.executable, "-c", PROGRAM, model, repr(settings)]
        began = time.time()
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ)
    first, log = printed.stdout.split("\n", 1)
    phases = {
        found[2].removeprefix("start: "): datetime.fromisoformat(found[1]).timestamp() - began
        for found in map(LINE.match, log.splitlines())
        if found
    }
    return phases | {"first token": float(first) - began}


def table(cold: dict[str, float], warm: dict[str, float]) -> str:
    """Two columns each: when, and how long after the line above."""
    lines = [f"{'until':28s} {'cold, s':>16s} {'warm, s':>16s}"]
    before = 0.0, 0.0
    for name, at in warm.items():
        now = cold.get(name, before[0]), at
        lines.append(f"{name:28s}" + "".join(f" {b:9.2f} {b - a:+6.2f}" for a, b in zip(before, now, strict=True)))
        before = now
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="a shape of gpu_shapes.py, or a folder with config.json and a tokenizer")
    parser.add_argument("--runs", type=int, default=3, help="with a full cache")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="a setting of scheduler or worker")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{Path(args.shape).name} on {card()}", flush=True)
    settings = {"load_format": "dummy", **dict(args.set)}
    with model_folder(args.shape) as folder, tempfile.TemporaryDirectory() as cache:
        cold = run(str(folder), settings, Path(cache))
        warm = [run(str(folder), settings, Path(cache)) for _ in range(args.runs)]
    middle = {name: statistics.median(one[name] for one in warm) for name in warm[0]}
    print(table(cold, middle))
    if args.json:
        found = {"cold": cold, "warm": middle}
        rows: dict[str, Any] = {f"start_{name}_s": round(phases["first token"], 2) for name, phases in found.items()}
        rows |= {f"start_{name}_phases": {phase: round(at, 2) for phase, at in phases.items()} for name, phases in found.items()}
        add_rows(args.json, Path(args.shape).name, rows, "gpu_start", NOTE)


if __name__ == "__main__":
    main()
