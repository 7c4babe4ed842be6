"""Ten times the arrivals that a worker can take: how fast refusals are, whether admitted streams keep their pace.

    python -m benchmarks.overload [--seconds 60] [--factor 10]

Real processes: scheduler, frontend and a simulated worker with steps of 20 ms and 8 slots (25 requests/s of 16 tokens).
This process is the clients: raw HTTP/1.1 on loopback, a connection per request. TPOT of the unloaded stack is measured first, with 8
streams at a time. Memory is the scheduler's resident size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from protocol.rundir import RunDir

STEP, SLOTS, TOKENS = 0.020, 8, 16
WAITING = 16  # requests that may wait
FLAT_AFTER = 20.0  # seconds, from which on memory must not grow


@dataclass
class Seen:
    """What the clients saw; times in seconds."""

    refused: list[float] = field(default_factory=list)  # until the refusal was read
    tpot: list[float] = field(default_factory=list)
    other: list[str] = field(default_factory=list)


async def request(port: int, number: int, seen: Seen) -> None:
    """One streamed completion."""
    body = json.dumps({"prompt": f"request {number}", "max_tokens": TOKENS, "stream": True, "ignore_eos": True}).encode()
    kind = "Content-Type: application/json\r\nConnection: close"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        began = time.monotonic()
        writer.write(head.encode() + body)
        status = (await reader.readline()).split()
        if status[1] == b"429":
            await reader.read()
            seen.refused.append(time.monotonic() - began)
            return
        times = []
        async for line in reader:
            if line.startswith(b"data: {") and b'"text"' in line:
                times.append(time.monotonic())
        if status[1] != b"200" or len(times) < 2:
            seen.other.append(status[1].decode())
            return
        seen.tpot.append((times[-1] - times[0]) / (TOKENS - 1))
    finally:
        writer.close()


async def calm(port: int, rounds: int) -> Seen:
    """Eight streams at a time, nothing waiting."""
    seen = Seen()
    for _ in range(rounds):
        await asyncio.gather(*(request(port, i, seen) for i in range(SLOTS)))
    return seen


async def crowd(port: int, rate: float, seconds: float, scheduler: psutil.Process) -> tuple[Seen, list[tuple[float, int]]]:
    """Evenly spaced arrivals; also the scheduler's memory over time, in bytes."""
    seen, memory, tasks = Seen(), [], []
    began = time.monotonic()
    for number in range(int(rate * seconds)):
        due = began + number / rate
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(request(port, number, seen)))
        if number % int(rate) == 0:
            memory.append((time.monotonic() - began, scheduler.memory_info().rss))
    await asyncio.gather(*tasks)
    return seen, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=10.0, help="arrivals, as a multiple of the capacity")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pw-", dir="/tmp"))
    env = {key: value for key, value in os.environ.items() if not key.startswith("PAGEWIRE_")}
    command = [sys.executable, "-P", "-m", "pagewire", "up", "--run-dir", str(folder / "run"), "--port", "0", "--admin-port", "0"]
    command += ["--runner", "simulated", "--step-time", str(STEP), "--max-num-seqs", str(SLOTS), "--max-waiting-requests", str(WAITING)]
    with (folder / "log").open("wb") as log:
        up = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        port = _port(folder / "log", up)
        services = RunDir(folder / "run").services()
        scheduler = psutil.Process(next(service.pid for service in services if service.role == "scheduler"))
        unloaded = asyncio.run(calm(port, 10))
        capacity = SLOTS / (TOKENS * STEP)
        seen, memory = asyncio.run(crowd(port, arguments.factor * capacity, arguments.seconds, scheduler))
    finally:
        up.terminate()
        up.wait(15)
        shutil.rmtree(folder, ignore_errors=True)
    before, under = (float(np.percentile(which.tpot, 99)) * 1e3 for which in (unloaded, seen))
    late = [size for at, size in memory if at >= min(FLAT_AFTER, arguments.seconds / 3)]
    print(f"admitted {len(seen.tpot)}, refused {len(seen.refused)}, other {len(seen.other)} in {arguments.seconds:.0f} s")
    if seen.refused:
        p50, p99 = np.percentile(seen.refused, (50, 99)) * 1e3
        print(f"refusals: median {p50:.1f} ms, p99 {p99:.1f} ms (goal: 20)")
    print(f"TPOT p99: {before:.2f} ms unloaded, {under:.2f} ms under load: {under / before - 1:+.1%} (goal: 10%)")
    print(f"scheduler's memory from {late[0] / 2**20:.1f} to {late[-1] / 2**20:.1f} MiB")


def _port(log: Path, up: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and up.poll() is None:
        text = log.read_text(errors="replace")
        if "ready: http://" in text:
            return int(text.split("ready: http://")[1].split()[0].rstrip("/").rsplit(":", 1)[1])
        time.sleep(0.1)
    raise SystemExit("the stack did not come up:\n" + log.read_text(errors="replace"))


if __name__ == "__main__":
    main()
