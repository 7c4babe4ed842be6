"""What a decode step costs the CPU of a worker on a card, stage by stage and thread by thread. No card is needed.

    python -m benchmarks.engine_host [--rows 1,64] [--steps 3000] [--step-time 0.0006]

The engine is real (kernels are compiled, which needs triton and NVRTC), the card is played: launches, replays, events and streams are
Python's calls that do nothing, so what the driver takes is missing here. First one thread goes through the stages of a step, in µs, the
median of all steps; then a whole worker's process is fed plans over its sockets, two ahead, while steps take --step-time,
and each of its threads gets a line: µs of CPU a step. `start` and what the main thread takes are what stands beside the card's step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ending import end_in_order
from benchmarks.worker_loop import WARM_UP, plans
from protocol.codec import decode, encode
from protocol.messages import Geometry, Ready, Result
from protocol.rundir import RunDir
from tests.gpu_worker.cuda.played_card import Card
from tests.gpu_worker.fake_scheduler import FakeScheduler

SEQUENCES, LENGTH = 64, 4096
AHEAD = 2  # plans under way


class Clocked:
    """An event of a card whose steps take `step_time` seconds, one after another."""

    step_time = 0.0
    _end = 0.0  # of the last step

    def __init__(self, **_: object) -> None:
        self._at = 0.0

    def record(self, *_: object) -> None:
        """A step ends here."""
        Clocked._end = self._at = max(Clocked._end, time.monotonic()) + self.step_time

    def synchronize(self) -> None:
        """Wait for it."""
        while self.step_time and (left := self._at - time.monotonic()) > 0:
            time.sleep(left)


def played_engine() -> Any:
    """An engine on a played card. Kernels may be compiled for it once."""
    Card()
    torch.cuda.Event = Clocked  # type: ignore[assignment,misc]
    from gpu_worker.cuda.engine import Engine  # needs triton
    from gpu_worker.cuda.memory import Options
    from gpu_worker.cuda.weights import UnreadWeights
    from gpu_worker.loading.config import ModelConfig
    from gpu_worker.loading.dummy import DummyTensors
    from gpu_worker.loading.source import Shard

    config = ModelConfig(
        family="qwen3", vocab_size=2048, hidden=512, intermediate=768, layers=2, heads=8, kv_heads=4, head_dim=128, max_length=LENGTH,
        norm_eps=1e-6, rope_theta=1e6, qk_norm=True, tied_embeddings=True,
    )  # fmt: skip
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    unread = UnreadWeights(DummyTensors(config, 1, cpu, dtype), config, cpu, dtype, Shard())
    blocks = SEQUENCES * LENGTH // 16
    return Engine(config, unread, Options(SEQUENCES, 8192, LENGTH, num_blocks=blocks, capture_idle=False))


def description(engine: Any) -> Any:
    """Of a model that has only its sizes."""
    from gpu_worker.runner import Description

    return Description("played", b"0" * 16, engine.geometry, "triton", [1])


def stages(engine: Any, rows: int, steps: int) -> dict[str, float]:
    """µs of each stage of a decode step in this thread, the median."""
    from gpu_worker.core import WorkerCore

    core = WorkerCore(description(engine))
    taken: dict[str, list[int]] = {}

    def timed(stage: str, call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter_ns()
        answer = call(*arguments)
        taken.setdefault(stage, []).append(time.perf_counter_ns() - began)
        return answer

    for body in plans(rows, steps, engine.geometry):
        plan = timed("decode", decode, body)
        timed("check", plan.check, engine.geometry)
        step = timed("apply", core.apply, plan)
        timed("start", engine.start, step)
        outcome = timed("finish", engine.finish)
        outcome.tokens[:] = 5  # no kernel has written any
        result = timed("result", core.result, step, outcome)
        timed("encode", encode, result)
    engine.reset()
    return {stage: round(float(np.median(times[WARM_UP:])) / 1000, 1) for stage, times in taken.items()}


def worker(run_dir: str, steps: int, step_time: float) -> None:
    """A worker's process on a played card; says what each of its threads has taken, µs a step, once so many steps are finished."""
    from gpu_worker import service
    from gpu_worker.cuda.runner import CudaRunner
    from gpu_worker.runner import Description, Outcome, Step
    from gpu_worker.settings import WorkerSettings

    def cpu() -> dict[str, float]:
        threads = {t.name: time.clock_gettime(time.pthread_getcpuclockid(t.ident)) for t in threading.enumerate() if t.ident}
        return threads | {"process": time.process_time()}

    class Played(CudaRunner):
        def load(self) -> Description:
            self._engine, self.finished = played_engine(), 0
            Clocked.step_time = step_time
            return description(self._engine)

        def finish(self, step: Step) -> Outcome:
            outcome = super().finish(step)
            outcome.tokens[:] = 5
            self.finished += 1
            if self.finished == WARM_UP:
                self.before = cpu()
            if self.finished == WARM_UP + steps:
                print(json.dumps({name: round((at - self.before[name]) / steps * 1e6, 1) for name, at in cpu().items()}), flush=True)
            return outcome

    service.make_runner = lambda settings, _: Played(settings)  # type: ignore[assignment]
    service.run(WorkerSettings(run_dir=Path(run_dir)))


def threads(rows: int, steps: int, step_time: float) -> dict[str, float]:
    """µs of CPU a step of each thread of a worker whose scheduler is two plans ahead; `interval` is the wall time of a step."""
    geometry = Geometry(16, SEQUENCES * LENGTH // 16, 0, SEQUENCES, LENGTH, 8192, 2048)
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        command = [sys.executable, "-m", "benchmarks.engine_host", "--worker", folder]
        command += ["--steps", str(steps), "--step-time", str(step_time)]
        scheduler = FakeScheduler(RunDir(Path(folder)).workers)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                scheduler.expect(Ready, 300)
                waiting = [decode(body) for body in plans(rows, WARM_UP + steps + 1, geometry)]
                began = time.monotonic()
                for plan in waiting[:AHEAD]:
                    scheduler.send(plan)
                for plan in waiting[AHEAD:]:
                    scheduler.expect(Result)
                    scheduler.send(plan)
                seconds = time.monotonic() - began
                assert process.stdout is not None
                return json.loads(process.stdout.readline()) | {"interval": round(seconds / len(waiting) * 1e6, 1)}
            finally:
                process.terminate()
                process.wait(20)
                scheduler.close()


def main() -> None:
    """Both tables for each number of rows."""
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,64", help="sequences in a step, one after another")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--step-time", type=float, default=0.0006, help="seconds of the played card")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.steps, options.step_time)
        return
    for rows in map(int, options.rows.split(",")):
        taken = stages(played_engine(), rows, options.steps)
        print(f"{rows} rows, stages: {taken} together {sum(taken.values()):.1f}", flush=True)
        print(f"{rows} rows, threads: {threads(rows, options.steps, options.step_time)}", flush=True)


if __name__ == "__main__":
    main()
