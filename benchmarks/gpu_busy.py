"""How busy the card is during W1's decode: the union of kernel intervals over 500 steps, beside the worker's own events.

    python -m benchmarks.gpu_busy --shape qwen3-0.6b [--json OUT] [--device cuda …]

Three real processes: this program is the frontend and runs W1 twice; in the second run, whose prompts are cached and whose
graphs exist, the worker profiles 500 decode steps (torch's profiler). Gaps inside a step count as idle. The worker's own
share is Σ step times / (Σ step times + Σ gaps between steps), by the card's clock, over the same steps. With `--device cpu`
torch's operators stand for the kernels, to see that the script runs. Options that are not this script's go to the worker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ending import end_in_order
from benchmarks.gpu_offline import QUICK, Bench, Sizes
from benchmarks.gpu_results import add_rows
from benchmarks.gpu_shapes import model_folder
from frontend.llm import LLM
from gpu_worker.runner import Description, Outcome, Runner, Step
from gpu_worker.settings import WorkerSettings

FOLDER, STEPS = "PAGEWIRE_BUSY_FOLDER", "PAGEWIRE_BUSY_STEPS"
SKIP = 20  # decode steps between the signal and the first profiled step
MARK = "prepare"  # the kernel that begins each step
NOTE = "three processes, W1 with cached prompts; union of kernel intervals by torch's profiler, beside the worker's own events"

Interval = tuple[int, int, str]  # start and end in nanoseconds, name


def busy_share(kernels: Sequence[Interval], mark: str) -> tuple[float, int]:
    """Share of the time in which at least one kernel runs, and the number of steps, between the first and last `mark` kernel.

    Without marks: from the first kernel's start to the last one's end. Raises ValueError if there is no time between.
    """
    kernels = sorted(kernels)
    marks = [start for start, _, name in kernels if name.startswith(mark)]
    begin, end = (marks[0], marks[-1]) if marks else (kernels[0][0], max(k[1] for k in kernels)) if kernels else (0, 0)
    if end <= begin:
        raise ValueError(f"{len(kernels)} kernels, {len(marks)} of them begin a step: no time to speak of")
    busy, until = 0, begin
    for start, stop, _ in kernels:
        first, last = max(start, until), min(stop, end)
        busy += max(0, last - first)
        until = max(until, last)
    return busy / (end - begin), max(0, len(marks) - 1)


class Profiled:
    """A Runner around another: profiles decode steps once a file named `begin` lies in the folder, and leaves `busy.json` there."""

    def __init__(self, runner: Runner, folder: Path, steps: int) -> None:
        self._runner, self._folder, self._left = runner, folder, SKIP + steps
        self._steps = steps
        self._profile: Any = None
        self._own: list[tuple[float, float]] = []
        self._first = self._last = 0  # plans whose outcomes count

    @property
    def counter(self) -> int:
        return self._runner.counter

    def load(self) -> Description:
        return self._runner.load()

    def reset(self) -> None:
        self._runner.reset()

    def idle(self, interrupted: Callable[[], bool]) -> bool:
        return self._runner.idle(interrupted)

    def start(self, step: Step) -> None:
        decode = len(step.slots) > 0 and bool((step.counts == 1).all())
        if decode and self._left and (self._folder / "begin").exists():
            self._left -= 1
            if self._left == self._steps:
                self._begin()
                self._first = step.plan.step
            elif not self._left:
                self._last = step.plan.step
                self._end()
        self._runner.start(step)

    def finish(self, step: Step) -> Outcome:
        outcome = self._runner.finish(step)
        if self._first and not self._last:
            self._own.append((outcome.seconds, outcome.idle))
        return outcome

    def _begin(self) -> None:
        import torch

        kind = torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU
        self._profile = torch.profiler.profile(activities=[kind])
        self._profile.start()

    def _end(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        events = self._profile.profiler.kineto_results.events()
        wanted = torch.autograd.DeviceType.CUDA if torch.cuda.is_available() else torch.autograd.DeviceType.CPU
        kernels = [(e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in events if e.device_type() == wanted]
        own = self._own[2:]  # the first two hold the profiler's start
        seconds, idle = (sum(pair[i] for pair in own) for i in (0, 1))
        share, steps = busy_share(kernels, MARK)
        found = {"share": share, "steps": steps or len(own), "kernels": len(kernels), "own_share": seconds / (seconds + idle)}
        (self._folder / "busy.tmp").write_text(json.dumps(found | {"own_step_ms": seconds / len(own) * 1e3}))
        (self._folder / "busy.tmp").rename(self._folder / "busy.json")


def worker() -> None:
    """The worker's process; its arguments are a worker's."""
    import gpu_worker.service
    from gpu_worker.cli import main as run_worker

    make, folder, steps = gpu_worker.service.make_runner, Path(os.environ[FOLDER]), int(os.environ[STEPS])

    def profiled(settings: WorkerSettings, environ: Any) -> Runner:
        return Profiled(make(settings, environ), folder, steps)

    gpu_worker.service.make_runner = profiled
    run_worker()


@contextlib.contextmanager
def services(model: Path, folder: Path, steps: int, extra: Sequence[str]) -> Iterator[Path]:
    """A scheduler and a profiled worker; gives their run directory. Their deadlines allow for the profiler's pauses."""
    run_dir = folder / "run"
    common = ("--run-dir", str(run_dir), "--times-factor", "10")
    script = "import sys; sys.argv[0] = 'worker'; from benchmarks.gpu_busy import worker; worker()"
    options = ("--model", str(model), "--load-format", "dummy", *common, *extra)
    commands = ([sys.executable, "-c", script, *options], [sys.executable, "-m", "scheduler_svc", *common])
    environ = os.environ | {FOLDER: str(folder), STEPS: str(steps)}
    processes = []
    try:
        for command in commands:
            processes.append(subprocess.Popen(command, env=environ, cwd=Path(__file__).parents[1]))
        yield run_dir
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="a shape of gpu_shapes.py, or a folder with config.json and a tokenizer")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="a few short prompts: the figures mean nothing")
    parser.add_argument("--json", type=Path)
    args, extra = parser.parse_known_args()
    with model_folder(args.shape) as model, tempfile.TemporaryDirectory(prefix="pagewire-busy-") as name:
        folder = Path(name)
        with services(model, folder, args.steps, extra) as run_dir, LLM(run_dir=run_dir) as llm:
            bench = Bench(str(model), {}, QUICK if args.quick else Sizes(), 1)
            prompts, lengths = bench.w1_requests()
            bench.seconds(llm, prompts, lengths, 0.6)
            (folder / "begin").touch()
            bench.seconds(llm, prompts, lengths, 0.6)
        found = json.loads((folder / "busy.json").read_text())
    print(json.dumps(found))
    if args.json:
        rows = {"w1_busy_share": round(found["share"], 4), "w1_busy_own_share": round(found["own_share"], 4)}
        add_rows(args.json, Path(args.shape).name, rows, "gpu_busy", f"{NOTE}; {found['steps']} steps, {found['kernels']} kernels")


if __name__ == "__main__":
    main()
