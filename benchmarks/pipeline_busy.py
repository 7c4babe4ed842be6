"""How busy the pipeline keeps a device: three real processes, a simulated one, and a link as long as one likes.

    python benchmarks/pipeline_busy.py [--steps 0.5 1 2 5 8] [--round-trips 0 5 20] [--depths 1 2 3 4 6 0] [--json FILE]

The scheduler and the worker (simulated runner) are processes of their own; between them lies a TCP proxy that delays
each way by half the round trip. This process is the frontend: it journals every token of 256 sequences at spread block
offsets, and every 10 steps one ends and another arrives. Busy share = Σ step times / (last end − first start) in the
device's own virtual time, over `--seconds` after two; no result is sent before its step's end (`gpu_worker/simulated.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import zmq

from benchmarks.ending import end_in_order
from benchmarks.tcp_proxy import serve
from frontend.entries import NewRequest
from frontend.journal import Journal
from protocol.columns import pack
from protocol.counters import Counters
from protocol.messages import Hello, SamplingParams
from protocol.rundir import RunDir
from protocol.sessions import Closed, Dialer, Opened, Received
from protocol.sockets import Context, dealer, received, send
from protocol.telemetry import Collector
from protocol.times import Times

SEQUENCES = 256
BLOCK = 16
EVERY = 10  # steps between two finishes
WARM_UP = 2.0  # seconds


@dataclass
class Row:
    """One measurement. Times in milliseconds, shares from 0 to 1."""

    step_ms: float
    round_trip_ms: float
    depth: int
    busy_share: float
    steps: int
    tokens_per_s: float
    sequences: int
    cpu_us: dict[str, float]  # per step: of scheduler, worker, and this process as the frontend


class Load:
    """The frontend's side: keeps SEQUENCES requests going, with ends spread so that one comes every EVERY steps."""

    def __init__(self, endpoint: str, sequences: int) -> None:
        self.sequences = sequences
        self.context: Context = zmq.Context()
        self.counters = Counters()
        self.times = Times()
        now = time.monotonic()
        self.dialer = Dialer(Hello("frontend", "bench", secrets.randbits(52) | 1, 0), 1, 1, self.times, self.counters, now)
        self.journal = Journal(1, self.times, self.counters)
        self.endpoint = endpoint
        self.socket = dealer(self.context, endpoint)
        self.numbers = itertools.count()
        self.tokens = 0

    def close(self) -> None:
        self.socket.close()
        self.context.term()

    def submit(self, max_tokens: int) -> None:
        number = next(self.numbers)
        prompt = [97 + (number * 7 + i * (number % 5 + 1)) % 26 for i in range(64 + number % BLOCK)]
        params = SamplingParams(max_tokens=max_tokens)
        new = NewRequest(secrets.token_bytes(16), "simulated", pack(prompt), params, [number], every_step=False)
        self.journal.submit(new, time.monotonic())

    def run(self, seconds: float) -> None:
        """Serve for a while."""
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            wait = min(self.dialer.next_time(), until) - now
            self.socket.poll(max(0, int(wait * 1000) + 1) if wait > 0 else 0)
            for frames in received(self.socket):
                self.handle(self.dialer.receive(0, 0, frames, time.monotonic()))
            self.turn()

    def turn(self) -> None:
        now = time.monotonic()
        self.handle(self.dialer.tick(now))
        for entry in list(self.journal.touched.values()):
            if entry.ended:
                if entry.error is not None:
                    raise SystemExit(f"a request failed: {entry.error.reason}")
                self.tokens += sum(len(choice.tokens) for choice in entry.choices)
                self.journal.done(entry)
                self.submit(max(self.sequences, 200) * EVERY)
        self.journal.touched.clear()
        while self.journal.out:
            self.dialer.send(self.journal.out.popleft(), now)
        if self.dialer.reopen:
            raise SystemExit("the session was lost")
        while self.dialer.out[0]:
            send(self.socket, self.dialer.out[0].popleft()[1])

    def handle(self, events: list[object]) -> None:
        for event in events:
            match event:
                case Opened(welcome):
                    self.journal.opened(welcome, time.monotonic())
                case Received(message):
                    self.journal.message(message, time.monotonic())
                case Closed():
                    raise SystemExit("the session was lost")


def measure(step: float, round_trip: float, depth: int, seconds: float, sequences: int) -> Row:
    """Run the three processes once. Times in seconds."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="pw-", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        run_dir = RunDir(folder / "run")
        context: Context = zmq.Context()
        stack.callback(context.term)
        collector = Collector(run_dir.telemetry, context)
        stack.callback(collector.close)
        with _port() as workers_port:
            pass
        bind = f"tcp://127.0.0.1:{workers_port}"
        scheduler = ["scheduler_svc", "--bind-workers", bind, "--depth", str(depth), "--max-num-seqs", str(SEQUENCES)]
        processes = {"frontend": psutil.Process(), "scheduler": psutil.Process(stack.enter_context(_service(run_dir, scheduler)))}
        proxy_port = stack.enter_context(_proxy(workers_port, round_trip / 2)) if round_trip else workers_port
        worker = ["gpu_worker", "--runner", "simulated", "--step-time", str(step), "--scheduler", f"tcp://127.0.0.1:{proxy_port}"]
        # 3,000 tokens for each sequence, prompt included
        worker += ["--num-gpu-blocks", str(SEQUENCES * 190), "--max-model-len", "4096", "--max-num-seqs", str(SEQUENCES)]
        processes["worker"] = psutil.Process(stack.enter_context(_service(run_dir, worker)))
        load = Load(run_dir.frontends, sequences)
        stack.callback(load.close)
        deadline = time.monotonic() + 20
        while not load.journal.models:
            if time.monotonic() > deadline:
                raise SystemExit("the stack did not come up:\n" + _logs(run_dir))
            load.run(0.05)
        for i in range(sequences):
            load.submit(EVERY * (i + 1) + 200)
        load.run(WARM_UP)
        first = _figures(collector, load)
        before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
        load.run(seconds)
        last = _figures(collector, load)
        busy, idle, steps, tokens = (last[name] - first[name] for name in ("step_seconds", "idle_seconds", "steps", "tokens"))
        cpu = {name: (sum(process.cpu_times()[:2]) - before[name]) / steps * 1e6 for name, process in processes.items()}
        return Row(step * 1000, round_trip * 1000, depth, busy / (busy + idle), int(steps), tokens / (busy + idle), sequences, cpu)


def _figures(collector: Collector, load: Load) -> dict[str, float]:
    """The worker's next published figures."""
    collector.receive()
    while True:
        load.run(0.1)
        for telemetry in collector.receive():
            if telemetry.role == "worker":
                return {name: telemetry.values[f"worker_{name}"] for name in ("step_seconds", "idle_seconds", "steps", "tokens")}


@contextlib.contextmanager
def _service(run_dir: RunDir, command: list[str]) -> Iterator[int]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PAGEWIRE_")}
    full = [sys.executable, "-P", "-m", command[0], "--run-dir", str(run_dir.path), *command[1:]]
    process = subprocess.Popen(full, env=env, stderr=subprocess.DEVNULL)
    try:
        yield process.pid
        if process.poll() is not None:
            raise SystemExit(f"{command[0]} ended with {process.returncode}:\n" + _logs(run_dir))
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _proxy(target: int, delay: float) -> Iterator[int]:
    """A proxy in a process of its own, so that it does not share this one's interpreter."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve_proxy, args=(target, delay, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve_proxy(target: int, delay: float, pipe: Connection) -> None:
    sys.setswitchinterval(0.0001)
    serve(target, delay, pipe.send)


@contextlib.contextmanager
def _port() -> Iterator[int]:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _logs(run_dir: RunDir) -> str:
    return "\n".join(path.read_text()[-2000:] for path in run_dir.logs.glob("*.log"))


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=float, nargs="+", default=[0.5, 1, 2, 5, 8], help="step times, ms")
    parser.add_argument("--round-trips", type=float, nargs="+", default=[0, 5, 20], help="ms; 0 is without a proxy")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4, 6, 0], help="plans in flight; 0 adapts")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--seconds", type=float, default=10.0, help="measured, after two of warm-up")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    rows = []
    print(
        f"{'step ms':>8} {'round trip ms':>14} {'depth':>6} {'busy':>7} {'steps':>7} {'tokens/s':>10}"
        "  CPU a step, µs: scheduler, worker, frontend",
        flush=True,
    )
    for round_trip, step, depth in itertools.product(arguments.round_trips, arguments.steps, arguments.depths):
        row = measure(step / 1000, round_trip / 1000, depth, arguments.seconds, arguments.sequences)
        rows.append(row)
        print(
            f"{row.step_ms:8.1f} {row.round_trip_ms:14.1f} {row.depth:6d} {row.busy_share:7.1%} {row.steps:7d} {row.tokens_per_s:10,.0f}"
            f"  {row.cpu_us['scheduler']:.0f} {row.cpu_us['worker']:.0f} {row.cpu_us['frontend']:.0f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpus": os.cpu_count(), "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
