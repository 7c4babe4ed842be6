"""What a stack costs that nobody asks anything, and how long it takes to end while eight streams run.

    python -m benchmarks.at_rest [--seconds 60] [--model …, --runner …: flags of `pagewire up`]

CPU is what the kernel counts for each thread (`/proc/PID/task/*/schedstat`, nanoseconds), in percent of one core; memory is
the resident set. The end: SIGTERM to `pagewire up` at the streams' first tokens, until the last of its processes is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil

from benchmarks.ending import end_in_order
from tests.e2e.stack import Stack, eventually

STREAMS = 8
SETTLE = 5.0  # seconds after the first answer


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process's threads that live, in seconds, to the nanosecond."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{process.pid}/task").glob("*/schedstat")) / 1e9


def name(process: psutil.Process) -> str:
    """The module or command that a process runs."""
    words = process.cmdline()
    return words[words.index("-m") + 1] if "-m" in words else words[0]


def at_rest(stack: Stack, seconds: float) -> None:
    """Print CPU and memory of each process over a time in which nothing happens."""
    family = stack.family()
    before = {p.pid: cpu_seconds(p) for p in family}
    begun = time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - begun
    total = 0.0
    for process in family:
        share = (cpu_seconds(process) - before[process.pid]) / passed
        total += share
        print(f"{name(process):24} {share:7.2%} of a core {process.memory_info().rss / 2**20:8.0f} MiB")
    print(f"{'all':24} {total:7.2%} of a core over {passed:.0f} s")


def ending(stack: Stack) -> None:
    """Print how long a stack with streams takes from SIGTERM to its last process's end."""
    begun = threading.Barrier(STREAMS + 1)

    def stream(i: int) -> None:
        body = {"prompt": f"A story, number {i}:", "max_tokens": 1000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{stack.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            begun.wait()
            with contextlib.suppress(httpx.HTTPError):
                for _ in lines:
                    pass

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(STREAMS)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    family = stack.family()
    sent = time.monotonic()
    stack.processes[0].popen.terminate()
    gone = [(p, eventually(lambda p=p: _gone(p) and time.monotonic(), 30)) for p in family]
    stack.processes[0].popen.wait()
    for thread in threads:
        thread.join()
    print(f"SIGTERM with {STREAMS} streams: all gone after {max(at for _, at in gone) - sent:.1f} s")


def _gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def main() -> None:
    """The command line."""
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="pw-") as folder, contextlib.closing(Stack(Path(folder))) as stack:
        stack.up(*flags)
        httpx.post(f"{stack.url}/v1/completions", json={"prompt": "Hello", "max_tokens": 4}, timeout=60).raise_for_status()
        time.sleep(SETTLE)
        at_rest(stack, options.seconds)
        ending(stack)


if __name__ == "__main__":
    main()
