"""Ten times the arrivals that a worker can take: how fast refusals are, whether admitted streams keep their pace.

    python -m benchmarks.overload [--seconds 60] [--factor 10] [--clients 2]

Real processes: scheduler, frontend and a simulated worker with steps of 20 ms and 8 slots (25 requests/s of 16 tokens).
The clients are processes with a bare poll loop, a connection per request, evenly spaced. They measure the server, not
themselves: a time runs from before `connect` to the moment at which the kernel received the answer's last byte
(SO_TIMESTAMPNS), however late the client reads it. Memory is the scheduler's resident size. The shares are of the time of
the crowd: a service on a core, and its main thread ready to run while other processes had the cores: where that is
not near nothing, the machine is measured and not the service.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from benchmarks.ending import end_in_order
from protocol.registration import ServiceRecord
from protocol.rundir import RunDir

STEP, SLOTS, TOKENS = 0.020, 8, 16
WAITING = 16  # requests that may wait
FLAT_AFTER = 20.0  # seconds, from which on memory must not grow
PATIENCE = 30.0  # seconds that a client waits for what it has asked for
EVENT_ID = re.compile(rb"id: \w+:\d+:(\d+):\d+\n")  # request:choice:tokens:characters
SO_TIMESTAMPNS = 35  # Linux: say when the kernel received what is read


Shares = npt.NDArray[np.float64]  # on a core, waiting for one


@dataclass
class Seen:
    """What clients saw; times in seconds."""

    refused: list[float] = field(default_factory=list)  # until the whole refusal had arrived
    tpot: list[float] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    late: list[float] = field(default_factory=list)  # by which a request went out behind its time

    def add(self, other: Seen) -> None:
        """Put another client's beside these."""
        self.refused += other.refused
        self.tpot += other.tpot
        self.other += other.other
        self.late += other.late


class Request:
    """One streamed completion on a connection of its own."""

    def __init__(self, port: int, number: int) -> None:
        body = json.dumps(
            {"prompt": f"request {number}", "max_tokens": TOKENS, "stream": True, "ignore_eos": True, "return_token_ids": True}
        ).encode()
        kind = "Content-Type: application/json\r\nConnection: close"
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.began = time.time()
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(head.encode() + body)
        self.socket.setblocking(False)
        self.status = b""
        self.tokens = self.first_tokens = 0
        self.first = self.last = 0.0

    def read(self) -> bool:
        """Take what has arrived. Whether that was the end."""
        data, notes, _, _ = self.socket.recvmsg(1 << 16, 64)
        if not data:
            self.socket.close()
            return True
        for _, _, note in notes:
            seconds, nanoseconds = struct.unpack("qq", note)
            at = seconds + nanoseconds * 1e-9
        self.status = self.status or data.split(b" ", 2)[1]
        if self.status == b"200":
            if not (counts := EVENT_ID.findall(data)):
                return False
            self.tokens = min(int(counts[-1]), TOKENS)  # the last event counts one more, for the end
            if not self.first:
                self.first, self.first_tokens = at, self.tokens
        self.last = at
        return False

    def count(self, seen: Seen) -> None:
        """Enter what has become of it."""
        if self.status == b"429":
            seen.refused.append(self.last - self.began)
        elif self.tokens >= TOKENS > self.first_tokens:
            seen.tpot.append((self.last - self.first) / (self.tokens - self.first_tokens))
        else:
            seen.other.append("all at once" if self.tokens >= TOKENS else self.status.decode() or "closed")


def client(port: int, first: float, interval: float, count: int) -> Seen:
    """Send `count` requests, the first at the wall time `first`, and read all their answers."""
    seen, poller, sent, end = Seen(), selectors.DefaultSelector(), 0, first + interval * count + PATIENCE
    while sent < count or poller.get_map():
        now = time.time()
        if now > end:
            seen.other += ["no end"] * len(poller.get_map())
            break
        due = first + sent * interval if sent < count else end
        if now >= due:
            seen.late.append(now - due)
            request = Request(port, sent)
            poller.register(request.socket, selectors.EVENT_READ, request)
            sent += 1
            continue
        for key, _ in poller.select(due - now):
            if key.data.read():
                poller.unregister(key.fileobj)
                key.data.count(seen)
    return seen


def calm(port: int, rounds: int) -> Seen:
    """Eight streams at a time, nothing waiting."""
    seen = Seen()
    for _ in range(rounds):
        seen.add(client(port, time.time(), 0.0, SLOTS))
    return seen


def crowd(port: int, rate: float, seconds: float, clients: int, scheduler: psutil.Process) -> tuple[Seen, list[tuple[float, int]]]:
    """Evenly spaced arrivals from several clients; also the scheduler's memory over time, in bytes."""
    seen, memory = Seen(), []
    with ProcessPoolExecutor(clients, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.5] * clients))  # until all of them have started
        began = time.time() + 0.2
        each = int(rate * seconds / clients)
        work = [pool.submit(client, port, began + i / rate, clients / rate, each) for i in range(clients)]
        while not all(future.done() for future in work):
            memory.append((time.time() - began, scheduler.memory_info().rss))
            time.sleep(1.0)
        for future in work:
            seen.add(future.result())
    return seen, memory


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=10.0, help="arrivals, as a multiple of the capacity")
    parser.add_argument("--clients", type=int, default=2, help="processes that send them")
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
        unloaded = calm(port, 10)
        capacity = SLOTS / (TOKENS * STEP)
        before, began = _cores(services), time.monotonic()
        seen, memory = crowd(port, arguments.factor * capacity, arguments.seconds, arguments.clients, scheduler)
        lasted = time.monotonic() - began
        shares = {name: (after - before[name]) / lasted for name, after in _cores(services).items()}
    finally:
        up.terminate()
        up.wait(15)
        shutil.rmtree(folder, ignore_errors=True)
    _report(unloaded, seen, memory, shares, arguments.seconds)


def _report(unloaded: Seen, seen: Seen, memory: list[tuple[float, int]], shares: dict[str, Shares], seconds: float) -> None:
    print(f"admitted {len(seen.tpot)}, refused {len(seen.refused)}, other {len(seen.other)} {set(seen.other) or ''} in {seconds:.0f} s")
    print(f"sent late: p99 {np.percentile(seen.late, 99) * 1e3:.1f} ms")
    print("on a core, waiting for one: " + ", ".join(f"{name} {on:.0%} {off:.0%}" for name, (on, off) in shares.items()))
    if seen.refused:
        p50, p99 = np.percentile(seen.refused, (50, 99)) * 1e3
        print(f"refusals: median {p50:.1f} ms, p99 {p99:.1f} ms (goal: 20)")
    before, under = (float(np.percentile(which.tpot, 99)) * 1e3 for which in (unloaded, seen))
    print(f"TPOT p99: {before:.2f} ms unloaded, {under:.2f} ms under load: {under / before - 1:+.1%} (goal: 10%)")
    late = [size for at, size in memory if at >= min(FLAT_AFTER, seconds / 3)]
    print(f"scheduler's memory from {late[0] / 2**20:.1f} to {late[-1] / 2**20:.1f} MiB")


def _cores(services: list[ServiceRecord]) -> dict[str, Shares]:
    """Seconds so far that each service had a core, and that its main thread waited for one, by name."""
    times = {}
    for service in services:
        waited = int(Path(f"/proc/{service.pid}/schedstat").read_text().split()[1]) * 1e-9
        times[service.name] = np.array([sum(psutil.Process(service.pid).cpu_times()[:2]), waited])
    return times


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
