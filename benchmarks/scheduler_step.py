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
from protocol.messages import Choice, Done, Geometry, Hello, Plan, Ready, Result, Resumed, SamplingParams, Submit
from scheduler_svc.engine import Engine
from scheduler_svc.settings import SchedulerSettings

BLOCK = 16
VOCABULARY = 50_000
WORKER, FRONTEND = 1, 2
LONGEST = 2000  # tokens of the outputs beside which a prompt arrives
PROMPTS = 15


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


class Arrival:
    """Long prompts that arrive, one after the other, while `seqs` sequences decode. The pool is full of what earlier
    prompts left, as it is after an hour of service: each block taken evicts a cached one."""

    def __init__(self, tokens: int, seqs: int) -> None:
        self.tokens, self.number = tokens, seqs
        blocks = (tokens + 64) // BLOCK * 2 + seqs * (128 + LONGEST) // BLOCK
        self.engine, self.geometry = started(seqs + 1, blocks, tokens + 600, 8192, 2)
        self.random = np.random.default_rng(0)
        for i in range(seqs):
            submit(self.engine, i, self.random.integers(1, VOCABULARY, 128 + i % BLOCK, dtype=np.int32), LONGEST)
        self.results: list[bytes] = []
        for _ in range(100):
            self.turn()

    def turn(self) -> float:
        """A result and a plan; returns their thread time in microseconds."""
        begin = time.thread_time_ns()
        if self.results:
            message = decode(self.results.pop(0))
            message.check(self.geometry)
            self.engine.worker_message(WORKER, message, 0.0)
        self.engine.schedule(0.0)
        frames = [(message, encode(message)) for _, message, _ in self.engine.out]
        spent = time.thread_time_ns() - begin
        self.engine.out.clear()
        self.results.extend(answer(message, self.random) for message, _ in frames if isinstance(message, Plan))
        return spent / 1e3

    def measure(self) -> tuple[float, float, float, float]:
        """One prompt: microseconds to hash, match and admit it (its first chunk included); what its further chunks add; by how
        much a plan was delayed at most; a turn without it."""
        calm = float(np.median([self.turn() for _ in range(40)]))
        prompt = self.random.integers(1, VOCABULARY, self.tokens, dtype=np.int32)
        self.number += 1
        message = Submit(self.number.to_bytes(16, "little"), self.number, "m", pack(prompt), SamplingParams(1), [Choice(0, 1)])
        frame = encode(message)
        begin = time.thread_time_ns()
        message = decode(frame)
        message.check(None)
        self.engine.frontend_message(FRONTEND, message, 0.0)
        arriving = [(time.thread_time_ns() - begin) / 1e3]
        worker = self.engine.workers[WORKER]
        while self.engine.next_time() < 0 or worker.queue:
            arriving.append(self.turn() - calm)
        chunks = []
        while worker.prefilling:
            chunks.append(self.turn() - calm)
        for _ in range(4):
            self.turn()
        self.engine.frontend_message(FRONTEND, Done(message.request), 0.0)
        return sum(arriving), sum(chunks), max([*arriving, *chunks]), calm


def arrival(tokens: int, seqs: int) -> dict[str, float]:
    """Medians over several prompts."""
    stage = Arrival(tokens, seqs)
    stage.measure()
    gc.collect()
    gc.freeze()
    rows = np.median([stage.measure() for _ in range(PROMPTS)], axis=0)
    names = ("arrival_us", "prefill_us", "longest_delay_us", "calm_step_us")
    return {"prompt": tokens, "seqs": seqs, **{name: round(float(value), 1) for name, value in zip(names, rows, strict=True)}}


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
