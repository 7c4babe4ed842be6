"""Cost of the worker's loop without a model: plan in → result out, the bytes of both included.

    python benchmarks/worker_loop.py [--rows 256] [--steps 2000] [--json]

Every row decodes one token; one in `block_size` crosses a block each step, so that plans carry block table entries as
a scheduler's do. Measured is thread time from the plan's bytes to the result's: decode, check, apply, start and finish
of a runner that samples a constant, result, encode. Goal: 200 µs at 256 rows (`docs/performance.md`).
"""

from __future__ import annotations

import json
import time
from collections import deque

import click
import numpy as np

from gpu_worker.byte_model import EOS, VOCAB
from gpu_worker.core import WorkerCore
from gpu_worker.runner import Description, Outcome
from protocol.codec import decode, encode
from protocol.columns import Int32, pack
from protocol.messages import Admit, Geometry, Plan, SamplingParams

BLOCK_SIZE = 16
PROMPT = 64
WARM_UP = 100


def plans(rows: int, steps: int, geometry: Geometry) -> list[bytes]:
    """The bytes of one plan that admits and prefills all rows at spread block offsets, then `steps` of decoding."""
    slots = np.arange(rows, dtype=np.int32)
    prompts = PROMPT + slots % BLOCK_SIZE
    params = SamplingParams(max_tokens=steps + 2, stop_ids=pack([EOS]))
    width = geometry.table_width

    def table(at: Int32, index: Int32) -> dict[str, bytes]:
        return {"assign_slots": pack(at), "assign_indices": pack(index), "assign_blocks": pack(at * width + index)}

    def row_columns(starts: Int32, counts: Int32) -> dict[str, bytes]:
        columns = {"slots": slots, "generations": np.ones(rows, np.int32), "starts": starts, "counts": counts}
        return {name: pack(column) for name, column in columns.items()} | {"outputs": pack(np.ones(rows, np.int32))}

    needed = -(-prompts // BLOCK_SIZE)
    indices = np.concatenate([np.arange(n, dtype=np.int32) for n in needed])
    admits = [Admit(int(s), pack(np.full(prompts[s], 97)), b"", int(s), params) for s in slots]
    binds = {"bind_slots": pack(slots), "bind_generations": pack(np.ones(rows, np.int32)), "bind_records": pack(slots)}
    made = [Plan(1, admits=admits, **binds, **table(np.repeat(slots, needed), indices), **row_columns(np.zeros_like(slots), prompts))]
    for step in range(steps):
        starts = (prompts + step).astype(np.int32)
        crossing = slots[starts % BLOCK_SIZE == 0]
        made.append(Plan(step + 2, **table(crossing, starts[crossing] // BLOCK_SIZE), **row_columns(starts, np.ones_like(slots))))
    return [encode(plan) for plan in made]


def measure(rows: int, steps: int) -> dict[str, float]:
    """Median and 99th percentile of the thread time per step, in µs."""
    max_model_len = -(-(PROMPT + BLOCK_SIZE + steps + 2) // BLOCK_SIZE) * BLOCK_SIZE
    width = max_model_len // BLOCK_SIZE
    geometry = Geometry(BLOCK_SIZE, rows * width, 0, rows, max_model_len, rows * (PROMPT + BLOCK_SIZE), VOCAB)
    core = WorkerCore(Description("none", b"", geometry, "none", [EOS]))
    tokens, flags = np.full(rows, 97, np.int32), np.zeros(rows, np.uint8)
    running: deque[Outcome] = deque()
    times = []
    for body in plans(rows, steps, geometry):
        began = time.thread_time_ns()
        plan = decode(body)
        plan.check(geometry)
        step = core.apply(plan)  # type: ignore[arg-type]
        running.append(Outcome(tokens, flags))
        encode(core.result(step, running.popleft()))
        times.append((time.thread_time_ns() - began) / 1000)
    steady = np.array(times[WARM_UP:])
    return {"rows": rows, "p50_us": round(float(np.median(steady)), 1), "p99_us": round(float(np.percentile(steady, 99)), 1)}


@click.command()
@click.option("--rows", type=int, multiple=True, default=(16, 64, 256, 1024), show_default=True, help="Sequences in a step.")
@click.option("--steps", default=2000, show_default=True, help="Steps measured.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(rows: tuple[int, ...], steps: int, as_json: bool) -> None:
    """Measure the worker's loop without a model."""
    results = [measure(n, steps) for n in rows]
    if as_json:
        print(json.dumps(results))
        return
    print(f"{'rows':>6} {'p50 µs':>8} {'p99 µs':>8}")
    for result in results:
        print(f"{result['rows']:>6} {result['p50_us']:>8} {result['p99_us']:>8}")


if __name__ == "__main__":
    main()
