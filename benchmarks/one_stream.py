"""Where the tokens of a single stream wait and where two of them are joined, from the device's step to the client's chunk.

    python -m benchmarks.one_stream [--step-time 0.001] [--tokens 1500] [--runs 3]           # a simulated device
    python -m benchmarks.one_stream --shape qwen3-0.6b                                       # on a card

One request at a time. The first lines are what a client sees with nothing traced: chunks and tokens, the time to the first
chunk, the gaps between chunks, CPU time of each service per token. Then one more stream is traced, and each stage gets a
row: gaps between its events; `joined`, the share that came less than half a step behind the one before, which a later stage
can only raise; `behind`, how long after the end of its own step; `takes`, how long it worked. All in microseconds. The
stages: device (its step ends), output (the result is made), answer (the worker's network thread sends it), result (the
scheduler has taken it), send (the plan made of that, two or more steps ahead, is on its way), receive (that plan is at the
worker), start (its step is enqueued), detokenize (the frontend has the token), chunk (the client has it). Options that are
not this script's go to `pagewire up`.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import psutil

from benchmarks.ending import end_in_order
from benchmarks.frontend_stream import spent
from benchmarks.gpu_shapes import model_folder

STAGES = (
    ("device", "forward"),
    ("output", "sample"),
    ("answer", "answer"),
    ("result", "result"),
    ("send", "send"),
    ("receive", "receive"),
    ("start", "start"),
    ("detokenize", "detokenize"),
)
ENDING = ("forward", "sample", "result", "send", "start", "detokenize")  # spans that count when they end
AHEAD = ("send", "receive", "start")  # of a later step: `behind` would compare it with a step that has not begun
NOTICED = 1.6  # seconds until every service notes its spans


@contextmanager
def stack(flags: Sequence[str]) -> Iterator[tuple[int, str, psutil.Process]]:
    """`pagewire up` with these flags: (port, admin's URL, process)."""
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        command = [sys.executable, "-P", "-m", "pagewire", "up", "--port", "0", "--admin-port", "0", "--run-dir", folder + "/run", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as up:
            try:
                assert up.stdout is not None
                words = next(line for line in up.stdout if line.startswith("ready: ")).split()
                yield int(words[1].rsplit(":", 1)[1]), words[3].strip("(,"), psutil.Process(up.pid)
            finally:
                up.terminate()
                up.wait(20)


def stream(port: int, prompt: int, tokens: int) -> tuple[float, list[float]]:
    """One streamed request with a prompt of so many ids: seconds to its first chunk, and when each chunk came."""
    ids = [(time.monotonic_ns() >> 8 * i) % 200 + 1 for i in range(4)] + [i % 200 + 1 for i in range(prompt - 4)]  # none is cached
    text = json.dumps({"prompt": ids, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    chunks: list[float] = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began, tail, over = time.monotonic(), b"", False
        connection.sendall(head.encode() + text)
        while not over and (data := connection.recv(1 << 16)):
            now = time.monotonic()
            *events, tail = (tail + data).split(b"\n\n")
            chunks += [now for event in events if b'"finish_reason":null' in event]
            over = any(event.endswith(b"data: [DONE]") for event in events)
    return chunks[0] - began, chunks


def gaps(times: Sequence[float]) -> list[float]:
    """Between neighbours, in order of time."""
    ordered = sorted(times)
    return [later - earlier for earlier, later in pairwise(ordered)]


def quantile(values: Sequence[float], share: float) -> float:
    """Of any values; NaN of none."""
    return sorted(values)[int(share * (len(values) - 1))] if values else float("nan")


def row(name: str, times: Sequence[float], step: float, behind: Sequence[float] = (), takes: Sequence[float] = ()) -> str:
    """A stage's line; times in microseconds."""
    between = gaps(times)
    joined = sum(gap < step / 2 for gap in between) / max(len(between), 1)
    columns = [f"{quantile(values, share):9.0f}" for values in (between, behind, takes) for share in (0.5, 0.9)]
    return f"{name:11s} {len(times):6d} {joined:7.1%}   {''.join(columns)}"


def traced(port: int, admin: str, prompt: int, tokens: int, seconds: float) -> tuple[list[dict[str, Any]], list[float]]:
    """The spans while one stream runs, and its chunks."""
    found: list[dict[str, Any]] = []

    def record() -> None:
        with urllib.request.urlopen(f"{admin}/trace?seconds={seconds:g}", timeout=seconds + 30) as answer:
            found.extend(event for event in json.load(answer)["traceEvents"] if event["ph"] == "X")

    recorder = threading.Thread(target=record)
    recorder.start()
    time.sleep(NOTICED)
    _, chunks = stream(port, prompt, tokens)
    recorder.join()
    return found, chunks


def table(spans: Sequence[dict[str, Any]], chunks: Sequence[float]) -> Iterator[str]:
    """The stages' rows."""
    ends = {span["args"]["step"]: span["ts"] + span["dur"] for span in spans if span["name"] == "forward"}
    step = statistics.median(span["dur"] for span in spans if span["name"] == "forward")
    yield f"device step {step:.0f} µs; µs, p50 and p90"
    yield f"{'stage':11s} {'events':>6s} {'joined':>7s}   {'gap':>9s}{'':9s}{'behind':>9s}{'':9s}{'takes':>9s}"
    for name, span_name in STAGES:
        mine = [span for span in spans if span["name"] == span_name]
        times = [span["ts"] + (span["dur"] if span_name in ENDING else 0) for span in mine]
        steps = [span.get("args", {}).get("step") for span in mine]
        behind = [] if span_name in AHEAD else [at - ends[number] for at, number in zip(times, steps, strict=True) if number in ends]
        yield row(name, times, step, behind, [span["dur"] for span in mine])
    yield row("chunk", [at * 1e6 for at in chunks], step)


def main() -> None:
    """Print what a client sees, then the stages."""
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="", help="a shape of gpu_shapes.py, or a folder with config.json and a tokenizer")
    parser.add_argument("--step-time", type=float, default=0.001, help="seconds, of the simulated device without --shape")
    parser.add_argument("--prompt", type=int, default=200, help="token ids")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--runs", type=int, default=3)
    args, extra = parser.parse_known_args()  # the rest goes to `pagewire up`
    with model_folder(args.shape) if args.shape else nullcontext() as folder:
        simulated = ["--runner", "simulated", "--step-time", str(args.step_time)]
        flags = ["--model", str(folder), "--load-format", "dummy"] if args.shape else simulated
        with stack([*flags, *extra]) as (port, admin, up):
            stream(port, args.prompt, 50)
            time.sleep(3 if args.shape else 0.5)  # sizes are captured meanwhile
            stream(port, args.prompt, 200)
            wall = 0.0
            for _ in range(args.runs):
                before, began = spent(up), time.monotonic()
                first, chunks = stream(port, args.prompt, args.tokens)
                wall = time.monotonic() - began
                cpu = {role: (seconds - before[role]) / args.tokens * 1e6 for role, seconds in spent(up).items()}
                between = [quantile(gaps(chunks), share) * 1e3 for share in (0.1, 0.5, 0.9, 0.99)]
                shown = " / ".join(f"{gap:.2f}" for gap in between)
                used = ", ".join(f"{role} {each:.0f}" for role, each in cpu.items() if role in ("frontend", "scheduler", "worker"))
                print(f"{len(chunks)} chunks of {args.tokens} tokens in {wall:.2f} s; first after {first * 1e3:.2f} ms; ", end="")
                print(f"gaps p10 / p50 / p90 / p99 {shown} ms; CPU µs a token: {used}", flush=True)
            print("\n".join(table(*traced(port, admin, args.prompt, args.tokens, wall + 2 * NOTICED))))


if __name__ == "__main__":
    main()
