"""A whole stack as real processes, and clients whose every byte is compared with what the oracle must have said."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from frontend.detokenizer import TextStream
from frontend.sampling import seeds_of
from frontend.tokenizer import Tokenizer
from gpu_worker.oracle import expected
from protocol.registration import ServiceRecord
from protocol.rundir import RunDir
from protocol.tokenizer_files import byte_bundle

EOS = 256


def eventually(what: Callable[[], Any], timeout: float = 60.0) -> Any:
    """What the call returns once that is true. The time only protects from a hang: a busy machine stands still for seconds."""
    deadline = time.monotonic() + timeout
    while not (result := what()):
        assert time.monotonic() < deadline, f"it did not become true within {timeout} s"
        time.sleep(0.02)
    return result


def is_over(process: psutil.Process) -> bool:
    """Whether it has ended, be it that nobody has asked for its exit code yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class Process:
    """One program that a test started; its output goes to a file."""

    command: Sequence[str]
    log: Path
    popen: subprocess.Popen[bytes]

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def line(self, pattern: str, timeout: float = 120.0) -> re.Match[str]:
        """The first match in the output, waited for."""

        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.output())
            assert found or self.popen.poll() is None, f"ended with {self.popen.returncode}:\n{self.output()}"
            return found

        try:
            match: re.Match[str] = eventually(look, timeout)
        except AssertionError as error:
            raise AssertionError(f"{pattern!r} did not come:\n{self.output()}") from error
        return match


class Stack:
    """Programs of one run directory, all of which are ended with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.processes: list[Process] = []
        self.url = ""
        self.admin = ""

    def start(self, *arguments: str, env: dict[str, str] | None = None, run_dir: Path | None = None) -> Process:
        """Start `pagewire ARGUMENTS --run-dir …`."""
        command = [sys.executable, "-P", "-m", "pagewire", *arguments, "--run-dir", str(run_dir or self.run_dir)]
        return self.program(command, env)

    def program(self, command: Sequence[str], env: dict[str, str] | None = None, cwd: Path | None = None) -> Process:
        """Start any program, in a process group of its own."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PAGEWIRE_")}
        log = self.folder / f"output-{len(self.processes)}.log"
        with log.open("wb") as file:
            popen = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env={**clean, **(env or {})}, start_new_session=True, cwd=cwd
            )
        process = Process(command, log, popen)
        self.processes.append(process)
        return process

    def up(self, *arguments: str, env: dict[str, str] | None = None) -> Process:
        """Start `pagewire up` on free ports and wait until it is ready."""
        process = self.start("up", "--port", "0", "--admin-port", "0", *arguments, env=env)
        ready = process.line(r"ready: (http://\S+) \(admin (http://[^ ,)]+)")
        self.url, self.admin = ready[1], ready[2]
        return process

    def service(self, role: str) -> ServiceRecord:
        """The (first) running service of a role, waited for: one that was killed comes back in its own time."""
        found: ServiceRecord = eventually(lambda: next((s for s in RunDir(self.run_dir).services() if s.role == role), None))
        return found

    def kill(self, role: str, sig: signal.Signals = signal.SIGKILL) -> int:
        """Signal a service; returns its pid. SIGKILL is waited for: the fault has happened."""
        pid = self.service(role).pid
        process = psutil.Process(pid)
        process.send_signal(sig)
        if sig == signal.SIGKILL:
            eventually(lambda: is_over(process))
        return pid

    def metrics(self) -> dict[str, float]:
        """The admin server's figures, by name and labels as they are printed. One is missing until its service has told it, and
        after ten seconds in which that service told nothing."""
        text = httpx.get(f"{self.admin}/metrics", timeout=60).text
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line and line[0] != "#"}

    def family(self) -> list[psutil.Process]:
        """Every process that descends from what the test started."""
        found = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(process.popen.pid)
                found += [top, *top.children(recursive=True)]
        return [p for p in found if not is_over(p)]

    def close(self) -> None:
        """End every process by its id."""
        family = self.family()
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(20)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        for process in self.processes:
            process.popen.wait(60)
        psutil.wait_procs(family, 60)  # or they would write into a folder that is being removed


@contextlib.contextmanager
def stack() -> Iterator[Stack]:
    """A stack in a folder of its own, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:
        made = Stack(Path(folder))
        try:
            yield made
        except BaseException:
            for process in made.processes:
                print(f"--- {' '.join(process.command)}\n{process.output()[-6000:]}")
            raise
        finally:
            made.close()


# ---------------------------------------------------------------- clients


@dataclass
class Streamed:
    """A completion as a client saw it: text and finish reason per choice, and how often each ended."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, list[str]] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    done: int = 0
    chunks: int = 0


def stream_completion(
    url: str, body: dict[str, Any], path: str = "/v1/completions", timeout: float = 150.0, seen: Streamed | None = None
) -> Streamed:
    """POST with stream=true and read the stream to its end; `seen` may be watched meanwhile."""
    seen = seen if seen is not None else Streamed()
    full = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", url + path, json=full, timeout=timeout) as response:
        if response.status_code != 200:
            response.read()
            seen.error = response.json()["error"]
            return seen
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                seen.done += 1
                continue
            event = json.loads(line[6:])
            if "error" in event:
                seen.error = event["error"]
                continue
            if event.get("usage"):
                seen.usage = event["usage"]
            for choice in event["choices"]:
                seen.chunks += 1
                text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                seen.texts[choice["index"]] = seen.texts.get(choice["index"], "") + text
                if choice["finish_reason"]:
                    seen.reasons.setdefault(choice["index"], []).append(choice["finish_reason"])
    return seen


def oracle_texts(body: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(text, finish reason, tokens) of each choice that an oracle stack owes for a completion with a string prompt."""
    tokenizer = Tokenizer.from_bundle(byte_bundle())
    prompt = tokenizer.encode_batch([body["prompt"]])[0]
    owed = []
    stops = body.get("stop") or []
    for seed in seeds_of(body["seed"], body.get("n", 1)):
        ends = [] if body.get("ignore_eos") else [EOS]
        tokens = expected(prompt, seed, body["max_tokens"], ends, temperature=body.get("temperature", 1.0))
        text = TextStream(tokenizer, [stops] if isinstance(stops, str) else stops)
        out, reason, count = "", "length", 0
        for token in tokens:
            count += 1
            if token == EOS and ends:
                reason = "stop"
                break
            out += text.push(token)
            if text.stop is not None:
                reason = "stop"
                break
        if text.stop is None:
            out += text.flush()
            if text.stop is not None:
                reason = "stop"
        owed.append((out, reason, count))
    return owed


class Clients:
    """Many streams at once, each in a thread; `finish` waits for them and compares every byte."""

    def __init__(self, url: str, bodies: list[dict[str, Any]]) -> None:
        self.bodies = bodies
        self.seen: list[Streamed | None] = [None] * len(bodies)
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(url, i), daemon=True) for i in range(len(bodies))]
        for thread in self._threads:
            thread.start()

    def _run(self, url: str, i: int) -> None:
        try:
            self.seen[i] = stream_completion(url, self.bodies[i])
        except BaseException as error:
            self.errors.append(error)

    @property
    def running(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def finish(self, timeout: float = 120.0) -> None:
        """Raises AssertionError if a stream differs from the oracle's, ends twice or not at all."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not self.running, f"{self.running} streams have no end"
        assert not self.errors, self.errors
        for body, seen in zip(self.bodies, self.seen, strict=True):
            assert seen is not None
            assert seen.error is None, (body, seen.error)
            assert seen.done == 1
            owed = oracle_texts(body)
            for index, (text, reason, _) in enumerate(owed):
                assert seen.texts.get(index, "") == text, (body, index)
                assert seen.reasons[index] == [reason], (body, index)
            assert seen.usage is not None
            assert seen.usage["prompt_tokens"] == len(body["prompt"].encode())
            assert seen.usage["completion_tokens"] == sum(count for _, _, count in owed)


def mixed_bodies(count: int, max_tokens: int = 120) -> list[dict[str, Any]]:
    """Streams of many kinds: plain, greedy, stop strings, n = 2, shared prefixes, without EOS."""
    bodies = []
    for i in range(count):
        body: dict[str, Any] = {"prompt": f"request {i} says " + "x" * (i * 7 % 60), "max_tokens": max_tokens - i % 7, "seed": i}
        match i % 6:
            case 1:
                body["temperature"] = 0
            case 2:
                body["stop"] = ["qu", "zz", "ab"]
            case 3:
                body["n"] = 2
            case 4:
                body["prompt"] = "the same long beginning of several prompts, again and again: " + str(i)
            case 5:
                body["ignore_eos"] = True
        bodies.append(body)
    return bodies
