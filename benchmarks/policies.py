"""What the scheduler's policies are worth: ShareGPT's lengths through the real engine, on simulated workers.

    python -m benchmarks.policies [--json FILE] [--plots FOLDER] [--only NAME ...]

Everything runs in virtual time (`virtual.py`), so the figures are the same on every machine. The replay: the 2,000
(prompt, output) lengths arrive as a Poisson stream of `RATE` requests/s per worker. The first half of each prompt is
the beginning of one of 8 common texts, so that there is something to hit. The conversations: 200 of 6 turns, each turn
with all that was said before; the KV of all workers together is half of what the conversations hold in the end.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.virtual import BLOCK, Machine, Served, Simulation

LENGTHS = Path(__file__).parent / "data" / "sharegpt_lengths.json"
RATE = 45.0  # requests/s per worker: nearly what one can do
THINKING = 20.0  # seconds between an answer and the next turn, mean


@dataclass
class Row:
    """One run. Times in milliseconds, hit rate from 0 to 1."""

    name: str
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    longest_step: float
    preemptions: int
    swaps: int
    hit_rate: float
    seconds: float
    blocks: int


def replay(name: str, workers: int = 1, blocks: int = 26_000, host_blocks: int = 0, count: int = 2000, **settings: object) -> Row:
    """ShareGPT's lengths once."""
    random = np.random.default_rng(0)
    simulation = Simulation([Machine(blocks=blocks, host_blocks=host_blocks)] * workers, **settings)
    common = [random.integers(0, 50_000, 4096, dtype=np.int32) for _ in range(8)]
    now = 0.0
    for prompt, output in json.loads(LENGTHS.read_text())[:count]:
        now += random.exponential(1 / (RATE * workers))
        shared = common[random.integers(8)][: prompt // 2]
        own = random.integers(0, 50_000, prompt - len(shared), dtype=np.int32)
        simulation.submit(Served(now, np.concatenate((shared, own)), output))
    simulation.run()
    return figures(name, simulation)


def conversations(name: str, workers: int, blocks: int, count: int = 200, turns: int = 6, **settings: object) -> Row:
    """Conversations that go on; `blocks` per worker."""
    random = np.random.default_rng(0)
    lengths = [pair for pair in json.loads(LENGTHS.read_text()) if sum(pair) <= 600]
    simulation = Simulation([Machine(blocks=blocks, slots=64)] * workers, **settings)
    # drawn here, so that they do not depend on the order in which turns end
    plans = [[(*lengths[random.integers(len(lengths))], random.exponential(THINKING)) for _ in range(turns)] for _ in range(count)]

    def say(conversation: int, turn: int, before: np.ndarray, now: float) -> None:
        asked, answered, thinking = plans[conversation][turn]
        words = np.random.default_rng((conversation, turn)).integers(0, 50_000, asked, dtype=np.int32)
        request = Served(now + thinking, np.concatenate((before, words)), answered, output=[])
        if turn + 1 < turns:
            request.after = lambda then: say(conversation, turn + 1, np.concatenate((request.prompt, request.output)), then)  # type: ignore[arg-type]
        simulation.submit(request)

    for conversation in range(count):
        say(conversation, 0, np.zeros(0, dtype=np.int32), 0.0)
    simulation.run()
    return figures(name, simulation)


def working_set(count: int = 200, turns: int = 6) -> int:
    """Blocks that the conversations hold in the end."""
    random = np.random.default_rng(0)
    lengths = [pair for pair in json.loads(LENGTHS.read_text()) if sum(pair) <= 600]
    total = 0
    for _ in range(count):
        tokens = 0
        for _ in range(turns):
            tokens += sum(lengths[random.integers(len(lengths))])
            random.exponential(THINKING)
        total += -(-tokens // BLOCK)
    return total


def figures(name: str, simulation: Simulation) -> Row:
    """What came of a run; all requests must have ended."""
    requests, counters = simulation.requests, simulation.counters
    assert all(request.tokens == request.max_tokens for request in requests), "a request has not ended"
    simulation.engine.check()
    ttft = np.array([request.ttft for request in requests]) * 1e3
    tpot = np.array([request.tpot for request in requests if not math.isnan(request.tpot)]) * 1e3
    queries = counters.get("scheduler_prefix_queries", 0)
    return Row(
        name,
        *(round(float(value), 1) for value in (*np.percentile(ttft, (50, 99)), *np.percentile(tpot, (50, 99)))),
        longest_step=round(simulation.longest_step * 1e3, 1),
        preemptions=counters.get("scheduler_preemptions", 0),
        swaps=counters.get("scheduler_swaps_out", 0),
        hit_rate=round(counters.get("scheduler_prefix_hits", 0) / queries, 3) if queries else 0.0,
        seconds=round(max(request.last for request in requests), 1),
        blocks=simulation.most_used,
    )


def replays() -> dict[str, Callable[[], Row]]:
    """The runs over ShareGPT's lengths, by name."""
    runs: dict[str, Callable[[], Row]] = {
        "caching on": lambda: replay("caching on"),
        "caching off": lambda: replay("caching off", enable_prefix_caching=False),
    }
    for chunk in (256, 512, 1024, 2048, 4096, 8192):
        runs[f"chunk {chunk}"] = lambda chunk=chunk: replay(f"chunk {chunk}", max_num_batched_tokens=chunk)  # type: ignore[misc]
    for mode in ("recompute", "swap", "auto"):
        runs[f"third of the blocks, {mode}"] = lambda mode=mode: third(mode)  # type: ignore[misc]
    for workers in (1, 2, 4):
        runs[f"workers {workers}"] = lambda workers=workers: replay(f"workers {workers}", workers)  # type: ignore[misc]
    return runs


def third(mode: str) -> Row:
    """A third of the blocks that the replay uses at its peak, and host memory for twice as many."""
    needed = replay("").blocks
    return replay(f"third of the blocks, {mode}", blocks=needed // 3, host_blocks=needed, preemption=mode)


def multi_turns() -> dict[str, Callable[[], Row]]:
    """The runs over conversations, by name."""
    half = working_set() // 2
    return {
        "one cache of all": lambda: conversations("one cache of all", 1, half),
        "4 workers, by prefix": lambda: conversations("4 workers, by prefix", 4, half // 4),
        "4 workers, by load": lambda: conversations("4 workers, by load", 4, half // 4, routing="load"),
        "4 workers, round-robin": lambda: conversations("4 workers, round-robin", 4, half // 4, routing="round-robin"),
    }


HEAD = (
    f"{'':32s} {'TTFT p50':>9} {'p99 ms':>9} {'TPOT p50':>9} {'p99 ms':>7} {'longest':>8} {'preempt':>8} {'swaps':>6} {'hits':>6} {'s':>7}"
)


def show(row: Row) -> None:
    """One line of the table."""
    times = f"{row.ttft_p50:9,.1f} {row.ttft_p99:9,.1f} {row.tpot_p50:9.1f} {row.tpot_p99:7.1f} {row.longest_step:8.1f}"
    print(f"{row.name:32s} {times} {row.preemptions:8d} {row.swaps:6d} {row.hit_rate:6.1%} {row.seconds:7.1f}", flush=True)


def plot(rows: dict[str, Row], folder: Path) -> None:
    """Two pictures: what the chunk size trades, and what routing keeps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "policies"
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    chunks = [(int(name.split()[1]), row) for name, row in rows.items() if name.startswith("chunk")]
    if chunks:
        figure, left = plt.subplots(figsize=(6, 3.5), layout="constrained")
        right = left.twinx()
        x = [chunk for chunk, _ in chunks]
        left.plot(x, [row.ttft_p99 for _, row in chunks], "o-", color="C0", label="TTFT p99")
        left.plot(x, [row.ttft_p50 for _, row in chunks], "o--", color="C0", label="TTFT median")
        right.plot(x, [row.longest_step for _, row in chunks], "s-", color="C1", label="longest step")
        right.plot(x, [row.tpot_p99 for _, row in chunks], "s--", color="C1", label="TPOT p99")
        left.set(xscale="log", xticks=x, xticklabels=x, xlabel="tokens of a step", ylabel="TTFT, ms", ylim=(0, None))
        right.set(ylabel="step and TPOT, ms", ylim=(0, None))
        left.minorticks_off()
        left.legend(loc="upper left")
        right.legend(loc="upper right")
        figure.savefig(folder / "scheduling-chunks.svg", metadata={"Date": None})
    turns = [row for name, row in rows.items() if name.startswith(("one cache", "4 workers"))]
    if turns:
        figure, axes = plt.subplots(figsize=(6, 2.5), layout="constrained")
        axes.barh([row.name for row in turns][::-1], [100 * row.hit_rate for row in turns][::-1], color="C0")
        axes.set(xlabel="tokens found in the cache, %", xlim=(0, 100))
        figure.savefig(folder / "scheduling-routing.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--plots", type=Path, help="folder for two SVG plots (needs matplotlib)")
    parser.add_argument("--only", nargs="+", help="runs whose name begins so")
    arguments = parser.parse_args()
    rows: dict[str, Row] = {}
    print(HEAD)
    for runs in (replays(), multi_turns()):
        for name, run in runs.items():
            if not arguments.only or name.startswith(tuple(arguments.only)):
                rows[name] = run()
                show(rows[name])
    one, prefix = rows.get("one cache of all"), rows.get("4 workers, by prefix")
    if one and prefix:
        print(f"routing by prefix keeps {prefix.hit_rate / one.hit_rate:.1%} of the hit rate of one cache of the total size")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows.values()], indent=1))
    if arguments.plots:
        plot(rows, arguments.plots)


if __name__ == "__main__":
    main()
