"""What a steady decode step costs the scheduler: one plan, one result, the frontends' messages.

    python benchmarks/scheduler_step.py --seqs 256 [--json]
    python benchmarks/scheduler_step.py --curve
    python benchmarks/scheduler_step.py --prompt 32768

Thread time, encoding and decoding included, sockets excluded; lengths spread evenly over block offsets, so that one
row in 16 crosses a block boundary in each step; prefix caching on. With `--json`: {"seqs", "p50_us", "p99_us"}.
Beside it stands the whole process's CPU per step when the same messages go through ZeroMQ sockets.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import click
import numpy as np
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protocol.codec import decode, encode
from protocol.columns import pack, unpack
from protocol.counters import Counters
from protocol.messages import Choice, Geometry, Hello, Plan, Ready, Result, Resumed, SamplingParams, Submit
from scheduler_svc.engine import Engine
from scheduler_svc.settings import SchedulerSettings

BLOCK = 16
VOCABULARY = 50_000
WORKER, FRONTEND = 1, 2


def started(seqs: int, blocks: int, max_model_len: int, step_tokens: int, depth: int) -> tuple[Engine, Geometry]:
    """An engine with one ready worker and one frontend."""
    settings = SchedulerSettings(Path("."), max_num_seqs=seqs, max_num_batched_tokens=step_tokens, depth=depth)
    engine = Engine(settings, Counters(), lambda session: 0)
    engine.hash_key = bytes(16)
    geometry = Geometry(BLOCK, blocks, 0, seqs, max_model_len, step_tokens, VOCABULARY)
    engine.worker_opened(WORKER, Hello("worker", "w", 1, 1), 0.0)
    engine.worker_message(WORKER, Ready("m", b"f", geometry, "none", pack([0]), tokenizer=bytes(16)), 0.0)
    engine.frontend_opened(FRONTEND, "f", 2, 0.0)
    engine.frontend_message(FRONTEND, Resumed(0), 0.0)
    engine.out.clear()
    return engine, geometry


def submit(engine: Engine, i: int, prompt: np.ndarray, max_tokens: int) -> None:
    params = SamplingParams(max_tokens)
    message = Submit(i.to_bytes(16, "little"), i, "m", pack(prompt), params, [Choice(0, i)])
    engine.frontend_message(FRONTEND, message, 0.0)


def answer(plan: Plan, random: np.random.Generator) -> bytes:
    """The result a worker would send."""
    n = int((unpack(plan.outputs) > 0).sum()) + len(plan.fork_rows) // 4
    ids = random.integers(1, VOCABULARY, n, dtype=np.int32)
    return encode(Result(plan.step, pack(np.ones(n, dtype=np.int32)), pack(ids), bytes(n), seconds=0.002))


class Loop:
    """The steady state: results go in, plans and tokens come out. `step` is what is measured."""

    def __init__(self, seqs: int, steps: int, depth: int = 2) -> None:
        longest = 512 + BLOCK + steps * 2 + 64
        self.engine, self.geometry = started(seqs, seqs * (longest // BLOCK + 2), longest + BLOCK, 8192, depth)
        random = self.random = np.random.default_rng(0)
        for i in range(seqs):
            submit(self.engine, i, random.integers(1, VOCABULARY, 128 + i % BLOCK, dtype=np.int32), longest - 256)
        self.results: list[bytes] = []
        worker = self.engine.workers[WORKER]
        while worker.queue or len(np.flatnonzero(worker.slots.state == 1)) or self.engine.next_time() < 0 or worker.running < seqs:
            self.engine.schedule(0.0)
            self.drain()
            self.engine.worker_message(WORKER, decode(self.results.pop(0)), 0.0)
        self.engine.schedule(0.0)
        self.drain()

    def drain(self) -> None:
        """The worker's part, not measured."""
        for _, message, _ in self.engine.out:
            if isinstance(message, Plan):
                self.results.append(answer(message, self.random))
        self.engine.out.clear()

    def step(self) -> tuple[list[bytes], int]:
        """One step; returns its frames and its thread time in nanoseconds."""
        frame = self.results.pop(0)
        engine = self.engine
        begin = time.thread_time_ns()
        message = decode(frame)
        message.check(self.geometry)
        engine.worker_message(WORKER, message, 0.0)
        engine.schedule(0.0)
        frames = [encode(message) for _, message, _ in engine.out]
        spent = time.thread_time_ns() - begin
        assert len(frames) == 2, "a steady step has one plan and one message of tokens"
        self.drain()
        return frames, spent


def measure(seqs: int, steps: int) -> dict[str, float]:
    """Percentiles of a step's thread time, in microseconds."""
    loop = Loop(seqs, steps + 200)
    for _ in range(100):
        loop.step()
    gc.collect()
    gc.freeze()
    spent = np.array([loop.step()[1] for _ in range(steps)]) / 1e3
    loop.engine.check()
    return {"seqs": seqs, "p50_us": round(float(np.median(spent)), 1), "p99_us": round(float(np.percentile(spent, 99)), 1)}


def with_sockets(seqs: int, steps: int) -> float:
    """CPU of the whole process per step, in microseconds, when every frame crosses a pair of sockets.

    They are inproc, so the kernel's part is missing: a lower bound."""
    loop = Loop(seqs, steps + 200)
    context = zmq.Context()
    near, far = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    near.bind("inproc://steps")
    far.connect("inproc://steps")
    begin, aside = time.process_time_ns(), 0
    for _ in range(steps):
        frames, _ = loop.step()
        for frame in frames:
            near.send(frame, copy=False)
        before = time.thread_time_ns()
        for _ in frames:
            far.recv(copy=False)
        aside += time.thread_time_ns() - before
        far.send(b"result")
        near.recv()
    spent = time.process_time_ns() - begin - aside
    context.destroy(linger=0)
    return spent / steps / 1e3


def arrival(tokens: int, seqs: int) -> dict[str, float]:
    """A long prompt arrives while `seqs` sequences decode: what it costs to hash, match and admit it (its first chunk
    included), what its further chunks add, and by how much a plan was delayed at most."""
    chunk = 8192
    engine, geometry = started(seqs + 1, (tokens + seqs * 600) // BLOCK + 64, tokens + 600, chunk, 2)
    random = np.random.default_rng(0)
    for i in range(seqs):
        submit(engine, i, random.integers(1, VOCABULARY, 128 + i % BLOCK, dtype=np.int32), 400)
    results: list[bytes] = []

    def turn() -> int:
        begin = time.thread_time_ns()
        if results:
            message = decode(results.pop(0))
            message.check(geometry)
            engine.worker_message(WORKER, message, 0.0)
        engine.schedule(0.0)
        frames = [(message, encode(message)) for _, message, _ in engine.out]
        spent = time.thread_time_ns() - begin
        engine.out.clear()
        results.extend(answer(message, random) for message, _ in frames if isinstance(message, Plan))
        return spent

    for _ in range(100):
        turn()
    calm = float(np.median([turn() for _ in range(100)]))
    prompt = random.integers(1, VOCABULARY, tokens, dtype=np.int32)
    begin = time.thread_time_ns()
    submit(engine, seqs, prompt, 100)
    submitted = time.thread_time_ns() - begin
    worker = engine.workers[WORKER]
    arriving: list[float] = []  # what turns took beyond a calm one, until the prompt is admitted
    while engine.next_time() < 0 or worker.queue:
        arriving.append(max(turn() - calm, 0.0))
    prefilling: list[float] = []
    while worker.prefilling:
        prefilling.append(max(turn() - calm, 0.0))
    return {
        "prompt": tokens,
        "seqs": seqs,
        "arrival_us": round((submitted + sum(arriving)) / 1e3, 1),
        "prefill_us": round(sum(prefilling) / 1e3, 1),
        "longest_delay_us": round(max([submitted, *arriving, *prefilling]) / 1e3, 1),
        "calm_step_us": round(calm / 1e3, 1),
    }


@click.command()
@click.option("--seqs", default=256, show_default=True, help="Sequences that decode.")
@click.option("--steps", default=2000, show_default=True, help="Steps measured.")
@click.option("--curve", is_flag=True, help="Measure 1 to 4,096 sequences.")
@click.option("--prompt", default=0, help="Measure the arrival of a prompt of so many tokens instead.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for machines.")
def main(seqs: int, steps: int, curve: bool, prompt: int, as_json: bool) -> None:
    """Measure the scheduler's step."""
    if prompt:
        rows = [arrival(prompt, seqs)]
    else:
        rows = [measure(n, steps) for n in ([1, 16, 64, 256, 512, 1024, 2048, 4096] if curve else [seqs])]
    if as_json:
        click.echo(json.dumps(rows if curve else rows[0]))
        return
    for row in rows:
        text = "  ".join(f"{name} {value:,}" for name, value in row.items())
        if not prompt:
            text += f"  with_sockets_us {with_sockets(int(row['seqs']), min(steps, 500)):,.1f}"
        click.echo(text)


if __name__ == "__main__":
    main()
