"""Services as real processes, each started, stopped, killed and watched on its own."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import zmq

from protocol.rundir import RunDir
from protocol.telemetry import Collector, Telemetry
from tests.e2e.stack import Process, Stack, eventually, stack
from tests.faults.link_proxy import LinkProxy
from tests.faults.load import STREAMS, Load

ORACLE = ("--runner", "oracle", "--max-num-batched-tokens", "128")

# Counted where one side has sent what the other cannot use; no fault between them excuses that.
DEFECTS = (
    "frame_bad",
    "message_bad",
    "message_unexpected",
    "wire_frame_bad",
    "wire_message_bad",
    "wire_message_unexpected",
    "wire_scheduler_unexpected_message",
    "wire_scheduler_faults",
)


class Fleet:
    """A stack whose parts a test starts one by one. `factor` scales the time constants, `step` are seconds of a step."""

    def __init__(self, made: Stack, factor: float = 1.0, step: float = 0.04, tcp: bool = False, env: dict[str, str] | None = None) -> None:
        self.stack = made
        self.factor = factor
        self.rundir = RunDir(made.run_dir)
        self.services: dict[str, Process] = {}
        self.urls: dict[str, str] = {}
        self._env = {"PAGEWIRE_ORACLE_STEP_TIME": str(step), **(env or {})}
        self.ports = _free_ports(2) if tcp else ()
        self.proxies: dict[str, LinkProxy] = {}  # by service
        self._told: dict[str, tuple[float, Telemetry]] = {}  # by service: when, and what
        self._ended: dict[tuple[str, str], float] = {}  # (service, figure) → sum over earlier incarnations
        self._read = 0.0  # when nothing more was there to be collected
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop collecting. The processes are the stack's to end."""
        self._closing.set()
        self._thread.join()
        for proxy in self.proxies.values():
            proxy.close()

    # ------------------------------------------------------------ starting

    @property
    def frontends_endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.ports[0]}" if self.ports else self.rundir.frontends

    @property
    def workers_endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.ports[1]}" if self.ports else self.rundir.workers

    def through_proxy(self, name: str, port: int) -> str:
        """The endpoint of a new proxy before a scheduler's port, for one service."""
        self.proxies[name] = LinkProxy(port)
        return f"tcp://127.0.0.1:{self.proxies[name].port}"

    def scheduler(self, name: str = "scheduler-0", *flags: str) -> Process:
        """Start a scheduler. Small steps, so that prefills take several."""
        if self.ports:
            flags = ("--bind-frontends", self.frontends_endpoint, "--bind-workers", self.workers_endpoint, *flags)
        return self._start("scheduler", name, "--max-num-batched-tokens", "128", *flags)

    def worker(self, name: str, *flags: str, env: dict[str, str] | None = None) -> Process:
        """Start an oracle worker."""
        if self.ports and "--scheduler" not in flags:
            flags = ("--scheduler", self.workers_endpoint, *flags)
        return self._start("worker", name, *ORACLE, *flags, env=env)

    def patched_worker(self, name: str, patch: str) -> Process:
        """Start an oracle worker whose process runs some Python first."""
        script = f"{patch}\nimport gpu_worker.cli, sys\nsys.argv[0] = 'worker'\ngpu_worker.cli.main()"
        flags = ("--run-dir", str(self.stack.run_dir), "--name", name, "--times-factor", str(self.factor), *ORACLE)
        process = self.stack.program([sys.executable, "-P", "-c", script, *flags], self._env)
        self.services[name] = process
        return process

    def frontend(self, name: str = "frontend-0", *flags: str) -> Process:
        """Start a frontend."""
        if self.ports and "--scheduler" not in flags:
            flags = ("--scheduler", self.frontends_endpoint, *flags)
        return self._start("frontend", name, "--port", "0", *flags)

    def _start(self, role: str, name: str, *flags: str, env: dict[str, str] | None = None) -> Process:
        process = self.stack.start(role, "--name", name, "--times-factor", str(self.factor), *flags, env={**self._env, **(env or {})})
        self.services[name] = process
        return process

    def ready(self, workers: int) -> None:
        """Wait until every frontend serves, with so many workers behind it."""
        for name, process in self.services.items():
            if name.startswith("frontend"):
                self.urls[name] = process.line(r"listening on (http://\S+)")[1]
        eventually(lambda: self.sum("workers_ready", "scheduler") >= workers)
        names = [name for name in self.services if name.startswith("frontend")]
        eventually(lambda: all(self.state(name) == "ready" for name in names))

    def state(self, name: str) -> str:
        """What a running service says of itself; empty if it does not run."""
        return next((s.state for s in self.rundir.services() if s.name == name), "")

    # ------------------------------------------------------------ faults

    def kill(self, name: str) -> float:
        """SIGKILL, and see that the process is gone; returns when."""
        process = self.services[name].popen
        assert process.poll() is None, f"{name} has ended by itself"
        began = time.monotonic()
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        return began

    @contextlib.contextmanager
    def stopped(self, name: str) -> Iterator[float]:
        """SIGSTOP, and see that it has stopped; SIGCONT at the end. Gives the time of the stop."""
        process = psutil.Process(self.services[name].popen.pid)
        began = time.monotonic()
        process.suspend()
        try:
            eventually(lambda: process.status() == psutil.STATUS_STOPPED)
            yield began
            assert process.status() == psutil.STATUS_STOPPED, f"{name} was woken by somebody else"
        finally:
            process.resume()

    @contextlib.contextmanager
    def kept(self, *names: str, env: dict[str, str] | None = None) -> Iterator[list[int]]:
        """Start these workers again whenever they end, as a supervisor does. Gives the exit codes, as they come."""
        codes: list[int] = []
        over = threading.Event()

        def keep() -> None:
            while not over.wait(0.1):
                for name in names:
                    if (code := self.services[name].popen.poll()) is not None:
                        codes.append(code)
                        self.worker(name, env=env)

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield codes
        finally:
            over.set()
            thread.join()

    # ------------------------------------------------------------ figures

    def _collect(self) -> None:
        with zmq.Context() as context, contextlib.closing(Collector(self.rundir.telemetry, context)) as collector:
            while not self._closing.is_set():
                if collector.socket.poll(100):
                    for telemetry in collector.receive():
                        self._take(telemetry)
                else:
                    self._read = time.monotonic()

    def _take(self, telemetry: Telemetry) -> None:
        before = self._told.get(telemetry.name)
        if before is not None and before[1].incarnation != telemetry.incarnation:
            for figure, value in before[1].values.items():
                key = (telemetry.name, figure)
                self._ended[key] = self._ended.get(key, 0.0) + value
        self._told[telemetry.name] = (time.monotonic(), telemetry)

    def figure(self, name: str, figure: str) -> float:
        """The last value that a service has published; 0 if it never did."""
        told = self._told.get(name)
        return told[1].values.get(figure, 0.0) if told else 0.0

    def total(self, figure: str, role: str = "") -> float:
        """A counter, summed over services, living and dead (as far as the dead could publish it)."""
        # Lists, since the collecting thread adds to both meanwhile.
        live = sum(told.values.get(figure, 0.0) for _, told in list(self._told.values()) if told.role.startswith(role))
        return live + sum(value for (name, f), value in list(self._ended.items()) if f == figure and name.startswith(role))

    def sum(self, figure: str, role: str) -> float:
        """A gauge, summed over the running services of a role."""
        return sum(told.values.get(figure, 0.0) for name, (_, told) in list(self._told.items()) if told.role == role and self._runs(name))

    def _runs(self, name: str) -> bool:
        return name in self.services and self.services[name].popen.poll() is None

    def fresh(self) -> None:
        """Wait until every running service has published anew. What had come by now and was not read yet does not count."""
        asked = time.monotonic()
        eventually(lambda: self._read > asked + 0.1)
        now = time.monotonic()

        def published(name: str) -> bool:
            told = self._told.get(name)
            return told is not None and told[0] > now

        eventually(lambda: all(published(name) for name in self.services if self._runs(name)))  # one that ends meanwhile owes nothing

    def costs_no_session(self, what: Callable[[], object], name: str = "") -> None:
        """Let something happen that ends no session (of one service). Raises AssertionError.

        A machine that stands still for a second ends some as well: it happens anew until it ended none, ten times at most.
        """

        def closed() -> float:
            figures = ("session_closed", "wire_session_closed")
            return sum(self.figure(name, figure) if name else self.total(figure) for figure in figures)

        for _ in range(10):
            before = closed()
            what()
            self.fresh()
            if closed() == before:
                return
        raise AssertionError(f"sessions of {name or 'somebody'} end each time")

    def at_rest(self, failed: int = 0, expected: Sequence[str] = ()) -> None:
        """Everything has been given back, and nobody has sent what could not be used, but for `expected` counters.

        Raises AssertionError.
        """

        def resting() -> bool:
            quantities = ("blocks_used", "requests_waiting", "requests_running", "plans_in_flight")
            return not any(self.sum(figure, role) for figure in quantities for role in ("scheduler", "frontend"))

        self.fresh()
        eventually(resting)
        assert self.sum("requests_failed", "frontend") == failed
        assert {figure: self.total(figure) for figure in DEFECTS if self.total(figure) and figure not in expected} == {}

    def answered(self, load: Load) -> None:
        """Each request was counted with exactly one ending. At rest, and only for frontends that have lived through it all."""

        def endings() -> list[float]:
            return [self.sum(f"requests_{how}", "frontend") for how in ("finished", "failed", "aborted")]

        eventually(lambda: sum(endings()) == len(load.seen))


def _free_ports(count: int) -> tuple[int, ...]:
    """Ports that nobody listens on, and that the system gives to nobody by itself: a scheduler that is killed wants its own again."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            port = random.randrange(20_000, 32_000)
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    return tuple(found)


@contextlib.contextmanager
def fleet(**options: Any) -> Iterator[Fleet]:
    """A fleet without services."""
    with stack() as made:
        running = Fleet(made, **options)
        try:
            yield running
        finally:
            running.close()


@contextlib.contextmanager
def serving(
    workers: int = 2,
    frontends: int = 1,
    worker_env: dict[str, str] | None = None,
    streams: int = STREAMS,
    max_tokens: int = 60,
    **options: Any,
) -> Iterator[tuple[Fleet, Load]]:
    """A fleet with streams well under way. Worker 0 gets `worker_env`."""
    with fleet(**options) as running:
        running.scheduler()
        for i in range(workers):
            running.worker(f"worker-{i}", env=worker_env if i == 0 else None)
        for i in range(frontends):
            running.frontend(f"frontend-{i}")
        running.ready(workers)
        load = Load(running.urls, streams, max_tokens)
        load.well_underway()
        yield running, load
