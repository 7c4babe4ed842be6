"""Streamed chunks per second of one and of two frontend processes, and their CPU time per chunk.

    python -m benchmarks.frontend_stream [--streams 128] [--tokens 1000] [--step-time 0.008] [--runner simulated|oracle]

A scheduler and a worker without a model run behind and offer streams / step-time chunks a second (by default 16,000).
Clients in processes of their own read raw sockets, all that have something every 50 ms, and count `data:` events, of which
each brings one token (their number is printed beside the tokens of the usage: a frontend that falls behind joins the tokens
of several steps in one event). chunks/s is over the time from the first event to the last. On a machine with few cores all
of them share those, so chunks/s is what is left to the frontend: CPU per chunk says what one core could do, and a column for
each process says who had the rest. The oracle computes its tokens from all that the KV blocks hold, and so takes more of it
than the simulated runner. With 6 cores or more offer 40,000 (--streams 320) to see what two frontends reach.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.ending import end_in_order

GOAL = 15_000  # chunks/s of one process
TWO = 1.8  # times as many of two, where there are cores for them
MORE = 1.1  # times the CPU of a chunk that two may take
PROMPT = "stream"
BLOCK = 16  # tokens
SWEEP = 0.05  # seconds between two looks of a client at its sockets: waking it for each chunk would cost the frontend's core
ROLES = ("frontend", "scheduler", "worker", "clients", "rest")


@dataclass
class Seen:
    """What one process of clients saw."""

    events: int  # with text
    tokens: int  # by usage
    first: float  # when the first event came
    last: float
    cpu: float  # seconds of its own


def read(port: int, streams: int, tokens: int, done: multiprocessing.Queue[Seen]) -> None:
    """Open so many streams, read all to their ends, and put what was seen."""
    import selectors

    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    text = json.dumps(body | {"allowed_token_ids": None}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(head.encode() + text)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)
        tails[connection] = b""
    events = told = 0
    first = 0.0
    while tails:
        time.sleep(SWEEP)
        for key, _ in selector.select():
            connection: socket.socket = key.fileobj  # type: ignore[assignment]
            data = tails[connection] + connection.recv(1 << 18)
            cut = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
            whole, tails[connection] = data[:cut], data[cut:]
            events += whole.count(b'"finish_reason":null')
            first = first or (time.monotonic() if events else 0.0)
            at = whole.find(b'"completion_tokens":')
            if at >= 0:
                told += int(whole[at + 20 : at + 32].split(b",")[0])
            if b"data: [DONE]" in whole:
                selector.unregister(connection)
                connection.close()
                del tails[connection]
    done.put(Seen(events, told, first, time.monotonic(), time.process_time()))


def spent(up: psutil.Process) -> dict[str, float]:
    """CPU seconds of a stack's processes by role: of all that descend from `pagewire up`, itself included."""
    seconds = dict.fromkeys(ROLES, 0.0)
    for process in (up, *up.children(recursive=True)):
        words = process.cmdline()
        module = words[words.index("-m") + 1] if "-m" in words else ""
        role = {"frontend": "frontend", "scheduler_svc": "scheduler", "gpu_worker": "worker"}.get(module, "rest")
        seconds[role] += sum(process.cpu_times()[:2])
    return seconds


def measure(frontends: int, streams: int, tokens: int, step: float, runner: str) -> tuple[int, int, float, dict[str, float]]:
    """(events, tokens, wall seconds, CPU seconds by role) of one run."""
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        blocks = streams * (-(-(tokens + len(PROMPT)) // BLOCK) + 1)  # no sequence is to wait for another's: that is another benchmark
        flags = ["--runner", runner, "--step-time", str(step), "--max-num-seqs", str(streams), "--num-gpu-blocks", str(blocks)]
        flags += ["--block-size", str(BLOCK), "--frontends", str(frontends)]
        command = [sys.executable, "-P", "-m", "pagewire", "up", "--port", "0", "--admin-port", "0", "--run-dir", folder + "/run", *flags]
        env = {**os.environ, "PAGEWIRE_ORACLE_STEP_TIME": str(step)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as up:
            try:
                assert up.stdout is not None
                line = next(line for line in up.stdout if "ready:" in line)
                port = int(line.split("http://127.0.0.1:")[1].split(" ")[0])
                services = []
                while len(services) < frontends or any(record["state"] != "ready" for record in services):
                    time.sleep(0.1)
                    services = [json.loads(file.read_text()) for file in Path(folder, "run/services").glob("frontend-*.json")]
                stack = psutil.Process(up.pid)
                done: multiprocessing.Queue[Seen] = multiprocessing.Queue()
                before = spent(stack)
                clients = [multiprocessing.Process(target=read, args=(port, streams // 2, tokens, done)) for _ in range(2)]
                for client in clients:
                    client.start()
                seen = [done.get(timeout=300) for _ in clients]
                cpu = {role: seconds - before[role] for role, seconds in spent(stack).items()}
                cpu["clients"] = sum(client.cpu for client in seen)
                wall = max(client.last for client in seen) - min(client.first for client in seen)
                return sum(client.events for client in seen), sum(client.tokens for client in seen), wall, cpu
            finally:
                up.terminate()
                up.wait(20)


def main() -> None:
    """Print the table."""
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--step-time", type=float, default=0.008, help="seconds between a stream's tokens; too few and chunks are joined")
    parser.add_argument("--runner", choices=("simulated", "oracle"), default="simulated")
    options = parser.parse_args()
    print(f"{psutil.cpu_count()} cores, {options.streams} streams of {options.tokens} tokens, steps of {options.step_time * 1e3:g} ms")
    print(f"{'frontends':>9} {'tokens':>9} {'events':>9} {'chunks/s':>9} {'goal':>7} {'one core':>9}   CPU µs/chunk: {', '.join(ROLES)}")
    rates, costs = [], []
    for frontends in (1, 2):
        events, told, wall, cpu = measure(frontends, options.streams, options.tokens, options.step_time, options.runner)
        per = {role: seconds / max(events, 1) * 1e6 for role, seconds in cpu.items()}
        shares = " ".join(f"{each:.1f}" for each in per.values())
        print(f"{frontends:>9} {told:>9} {events:>9} {events / wall:>9,.0f} {GOAL:>7,} {1e6 / per['frontend']:>9,.0f}   {shares}")
        rates.append(events / wall)
        costs.append(per["frontend"])
    print(
        f"two beside one: {rates[1] / rates[0]:.2f} × the chunks/s (goal {TWO} with 6 cores or more), "
        f"{costs[1] / costs[0]:.2f} × the CPU of a chunk (goal {MORE} at most)"
    )


if __name__ == "__main__":
    main()
