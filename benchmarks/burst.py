"""What stands between a burst of long prompts and its device: three real processes, and what the device did in each step.

    python -m benchmarks.burst [--rows prefill,shared,w1] [--runs 5] [--steps] [--shape qwen3-0.6b] [--set KEY=VALUE]

The prompts are those of `gpu_offline.py`; this program is the frontend (offline API), scheduler and worker are processes that
it starts. Without `--shape` the worker's device is simulated: `COST` gives its steps about the times of the 0.6B shape on an
H200 (256 decodes over 2,048 packed tokens 4.5 ms, 8,192 tokens of prefill 23 ms, one decode 0.8). With it, it is the one of
this machine.

Times in ms, medians of the runs after a first: `head` from the call to the start of the first step, `gaps` in which the device
had nothing to do between its steps, `tail` from the last step's end to the return; `device` is the sum of the steps. CPU time of
each process beside them, which a busy machine disturbs less. `--steps` prints the steps of the last run: when it ended (from the
call), how long the device took and had waited, how long its start took the worker's main thread, rows, tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.ending import end_in_order
from benchmarks.gpu_offline import setting
from benchmarks.gpu_shapes import model_folder
from frontend.llm import LLM
from frontend.offline import SamplingParams
from gpu_worker import service
from gpu_worker.runner import Description, Outcome, Runner, Step
from gpu_worker.runners import make_runner
from gpu_worker.settings import WorkerSettings
from gpu_worker.simulated import SimulatedRunner, StepTime

COST = StepTime(0.8e-3, 2.7e-6, 5.6e-9)
VOCABULARY = 151_936  # of the simulated model
BLOCKS = 32_768
COLUMNS = ("wall", "head", "device", "gaps", "tail", "steps", "tokens", "CPU frontend", "scheduler", "worker")


class Simulated(SimulatedRunner):
    """Takes `COST`, and ids as large as a model's."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings, COST)

    def load(self) -> Description:
        found = super().load()
        return dataclasses.replace(found, geometry=msgspec.structs.replace(found.geometry, vocab_size=VOCABULARY))


class Recorded:
    """A runner that writes down its steps, a line of `Line`'s fields each."""

    def __init__(self, runner: Runner, file: Path) -> None:
        self._runner = runner
        self._file = file.open("w", buffering=1)
        self._starting: dict[int, float] = {}  # step → seconds that its start took

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def start(self, step: Step) -> None:
        began = time.monotonic()
        self._runner.start(step)
        self._starting[step.plan.step] = time.monotonic() - began

    def finish(self, step: Step) -> Outcome:
        outcome = self._runner.finish(step)
        starting = self._starting.pop(step.plan.step)
        if len(step.slots):
            line = (time.monotonic(), outcome.seconds, outcome.idle, starting, len(step.slots), int(step.counts.sum()))
            self._file.write(" ".join(map(str, line)) + "\n")
        return outcome


@dataclasses.dataclass
class Line:
    """One step, in seconds."""

    ended: float
    took: float
    waited: float
    starting: float
    rows: float
    tokens: float


def worker(folder: Path, settings: WorkerSettings) -> None:
    """Be the worker."""
    service.make_runner = lambda settings, environ: Recorded(
        Simulated(settings) if settings.runner == "simulated" else make_runner(settings, environ), folder / "steps"
    )
    service.run(settings)


def bursts(row: str, draw: random.Random) -> tuple[list[list[int]], list[int]]:
    """Prompts and output lengths, as in `gpu_offline.py`."""

    def ids(count: int) -> list[int]:
        return [draw.randint(0, 10000) for _ in range(count)]

    match row:
        case "prefill":
            return [ids(3584) for _ in range(32)], [1] * 32
        case "shared":
            prefix = ids(2048)
            return [prefix + ids(64) for _ in range(256)], [64] * 256
        case "w1":
            return [ids(draw.randint(100, 1024)) for _ in range(256)], [draw.randint(100, 1024) for _ in range(256)]
    raise SystemExit(f"--rows {row}: some of prefill,shared,w1")


def spent(processes: list[int]) -> list[float]:
    """CPU seconds of each process, all threads."""
    files = [Path(f"/proc/{process}/task").glob("*/schedstat") for process in processes]
    return [sum(int(file.read_text().split()[0]) for file in threads) / 1e9 for threads in files]


class Bench:
    """The services, and bursts that are sent to them."""

    def __init__(self, llm: LLM, folder: Path, services: list[int]) -> None:
        self.llm, self.steps, self.processes = llm, folder / "steps", [os.getpid(), *services]
        self.draw = random.Random(1)

    def burst(self, row: str) -> tuple[list[float], list[str]]:
        """The columns of one burst, and its steps."""
        prompts, lengths = bursts(row, self.draw)
        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, seed=i) for i, n in enumerate(lengths)]
        known, before = self.steps.stat().st_size, spent(self.processes)
        began = time.monotonic()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        ended = time.monotonic()
        cpu = [now - then for now, then in zip(spent(self.processes), before, strict=True)]
        if [len(output.outputs[0].token_ids) for output in outputs] != lengths:
            raise SystemExit("an output has not the length that was asked for")
        steps = [Line(*map(float, line.split())) for line in self.steps.read_text()[known:].splitlines()]
        head = steps[0].ended - steps[0].took - began
        device, gaps = sum(step.took for step in steps), sum(step.waited for step in steps[1:])
        times = [ended - began, head, device, gaps, ended - steps[-1].ended]
        shown = [
            f"{(s.ended - began) * 1e3:9.2f} ms: {s.took * 1e3:7.2f} after {s.waited * 1e3:7.2f}, started in {s.starting * 1e3:6.2f}"
            f"{s.rows:6.0f} rows {s.tokens:6.0f} tokens"
            for s in steps
        ]
        return [t * 1e3 for t in times] + [len(steps), sum(step.tokens for step in steps)] + [c * 1e3 for c in cpu], shown


@contextlib.contextmanager
def service_of(command: list[str]) -> Iterator[int]:
    """Run a service; yields its process id. This program ends with what the service said last, should it end before."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, "-m", *command], stderr=said)
        wanted = True

        def watch() -> None:
            if process.wait() and wanted:
                said.seek(0)
                print(f"{command[0]} ended with code {process.returncode}:\n{said.read()[-2000:]}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield process.pid
        finally:
            wanted = False
            process.terminate()
            watcher.join()


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="prefill,shared")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", action="store_true", help="print the steps of the last run")
    parser.add_argument("--shape", help="a shape of gpu_shapes.py, or a folder with config.json and a tokenizer")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="a setting of the worker")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)  # this program is the worker; its run directory
    args = parser.parse_args()
    if args.worker:
        folder = Path(args.worker)
        own = {"model": args.shape, "load_format": "dummy"} if args.shape else {"runner": "simulated", "num_gpu_blocks": BLOCKS}
        worker(folder, WorkerSettings(folder, **own | dict(args.set)))
        return
    with contextlib.ExitStack() as stack:
        run_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp"))
        told = ["--worker", run_dir] + [word for key, value in args.set for word in ("--set", f"{key}={value}")]
        if args.shape:
            told += ["--shape", str(stack.enter_context(model_folder(args.shape)))]
        services = []
        for command in (["scheduler_svc", "--run-dir", run_dir], ["benchmarks.burst", *told]):
            services.append(stack.enter_context(service_of(command)))
        bench = Bench(stack.enter_context(LLM(run_dir=run_dir)), Path(run_dir), services)
        print(f"{'':8}" + "".join(f"{column:>13}" for column in COLUMNS), flush=True)
        for row in args.rows.split(","):
            runs = [bench.burst(row) for _ in range(1 + args.runs)]
            figures = [statistics.median(run[0][i] for run in runs[1:]) for i in range(len(COLUMNS))]
            print(f"{row:8}" + "".join(f"{figure:13.1f}" for figure in figures), flush=True)
            if args.steps:
                print("\n".join(runs[-1][1]))


if __name__ == "__main__":
    main()
