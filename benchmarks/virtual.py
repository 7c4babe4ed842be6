"""The real scheduler engine against simulated workers, in virtual time: hours of serving in seconds, exact and repeatable.

A worker's step takes base + token · (tokens computed) + kv · (KV entries read) + copy · (blocks copied), which is what
a decode or prefill on one card costs; the defaults are those of an 8B model on an H100 (TARGETS: 5 ms for the weights,
20 µs of arithmetic per token, 131,072 B of KV per token at 3.2 TB/s, 2 MiB per block over PCIe at 50 GB/s).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from protocol.columns import Int32, pack, unpack
from protocol.counters import Counters
from protocol.messages import Choice, Done, Failed, Geometry, Hello, Plan, Ready, Result, Resumed, SamplingParams, Submit, Tokens
from scheduler_svc.engine import Engine
from scheduler_svc.settings import SchedulerSettings

BLOCK = 16
VOCABULARY = 50_000


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    base: float = 5.0e-3
    token: float = 20e-6
    kv: float = 41e-9
    copy: float = 42e-6

    def of(self, plan: Plan) -> float:
        """The time of a plan's step."""
        copied = (len(plan.out_to) + len(plan.in_to)) / 4
        if not plan.slots:
            return copied * self.copy
        starts, counts = unpack(plan.starts), unpack(plan.counts)
        total = int(counts.sum())
        return self.base + self.token * total + self.kv * (int(starts.sum()) + total) + self.copy * copied


@dataclass(frozen=True)
class Machine:
    """A worker: its sizes, the speed of its steps, and one way of its link in seconds."""

    blocks: int = 26_000
    host_blocks: int = 0
    slots: int = 256
    max_model_len: int = 4096
    max_step_tokens: int = 8192
    time: StepTime = field(default_factory=StepTime)
    link: float = 0.1e-3
    model: str = "m"


@dataclass(slots=True)
class Served:
    """One request. Times in virtual seconds; `first` is inf until a token has come."""

    arrival: float
    prompt: Int32
    max_tokens: int
    tenant: str = ""
    first: float = float("inf")
    last: float = float("inf")
    tokens: int = 0
    cached: int = 0
    failed: Failed | None = None
    number: int = 0
    output: list[int] | None = None  # its tokens, where a list is given
    after: Callable[[float], None] | None = None  # called when it has ended

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.arrival

    @property
    def tpot(self) -> float:
        """Seconds per token behind the first; nan if there is none."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else float("nan")


class Simulation:
    """An engine, workers and frontends; requests are `submit`ted with their time, `run` serves them."""

    def __init__(self, machines: list[Machine], frontends: int = 1, **settings: object) -> None:
        self.now = 0.0
        self.counters = Counters()
        self.engine = Engine(SchedulerSettings(Path("."), **settings), self.counters, self._unacked)  # type: ignore[arg-type]
        self.engine.hash_key = bytes(16)
        self.requests: list[Served] = []
        self.most_used = 0  # blocks of all workers
        self.stopped: set[int] = set()  # frontends that read nothing
        self.longest_step = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._free_at: dict[int, float] = {}
        self._machines: dict[int, Machine] = {}
        self._random = np.random.default_rng(1)
        self._undelivered: dict[int, list[Tokens]] = {}
        for number, machine in enumerate(machines):
            session = 100 + number
            self._machines[session] = machine
            self._free_at[session] = 0.0
            geometry = Geometry(
                BLOCK, machine.blocks, machine.host_blocks, machine.slots, machine.max_model_len, machine.max_step_tokens, VOCABULARY
            )
            self.engine.worker_opened(session, Hello("worker", f"w{number}", number + 1, 1), 0.0)
            ready = Ready(machine.model, machine.model.encode(), geometry, "none", tokenizer=bytes(16))
            self.engine.worker_message(session, ready, 0.0)
        for session in range(1, frontends + 1):
            self.engine.frontend_opened(session, f"f{session}", session, 0.0)
            self.engine.frontend_message(session, Resumed(0), 0.0)
            self._undelivered[session] = []
        self._deliver()

    def submit(self, request: Served, frontend: int = 1, priority: int = 0, model: str = "m") -> None:
        """The request arrives at its time."""
        number = request.number = len(self.requests)
        self.requests.append(request)
        params = SamplingParams(request.max_tokens)
        message = Submit(
            number.to_bytes(16, "little"),
            number,
            model,
            pack(request.prompt),
            params,
            [Choice(0, number)],
            priority=priority,
            tenant=request.tenant,
        )
        self.at(request.arrival, lambda: self.engine.frontend_message(frontend, message, self.now))

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._events, (time, next(self._count), action))

    def run(self, until: float = float("inf")) -> None:
        """Serve until nothing is left to do, or until a time."""
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
            self._turn()

    def resume(self, frontend: int) -> None:
        """A frontend that had stopped reads on."""
        self.stopped.discard(frontend)
        for message in self._undelivered[frontend]:
            self._take(frontend, message)
        self._undelivered[frontend].clear()
        self._turn()

    def _unacked(self, session: int) -> int:
        return sum(len(message.ids) // 4 for message in self._undelivered[session])

    def _turn(self) -> None:
        engine = self.engine
        engine.tick(self.now)
        engine.schedule(self.now)
        self._deliver()
        while engine.next_time() < self.now:  # arrivals that are being hashed
            engine.schedule(self.now)
            self._deliver()

    def _deliver(self) -> None:
        out = self.engine.out
        while out:
            session, message, _ = out.popleft()
            if isinstance(message, Plan):
                self._step(session, message)
            elif isinstance(message, Tokens):
                if session in self.stopped:
                    self._undelivered[session].append(message)
                else:
                    self._take(session, message)
            elif isinstance(message, Failed):
                request = self.requests[int.from_bytes(message.request, "little")]
                request.failed = message
                self.at(self.now, lambda session=session, request=request: self._end(session, request))  # type: ignore[misc]

    def _step(self, session: int, plan: Plan) -> None:
        machine = self._machines[session]
        began = max(self._free_at[session], self.now + machine.link)
        idle = began - self._free_at[session]
        seconds = machine.time.of(plan)
        self.longest_step = max(self.longest_step, seconds)
        end = self._free_at[session] = began + seconds
        n = int((unpack(plan.outputs) > 0).sum()) + len(plan.fork_rows) // 4
        ids = self._random.integers(0, VOCABULARY, n, dtype=np.int32)
        ones = np.ones(n, dtype="<i4").tobytes()
        result = Result(plan.step, ones, pack(ids), bytes(n), copied=plan.step, seconds=seconds, idle=idle)
        self.most_used = max(self.most_used, sum(w.blocks.used for w in self.engine.workers.values()))
        self.at(end + machine.link, lambda: self.engine.worker_message(session, result, self.now))

    def _take(self, session: int, message: Tokens) -> None:
        for handle, cached in zip(unpack(message.admitted).tolist(), unpack(message.cached).tolist(), strict=True):
            self.requests[handle].cached = cached
        named = (message.handles, message.counts, message.ids)  # a row has one token
        for handle, count, token in zip(*(unpack(column).tolist() for column in named), strict=True):
            request = self.requests[handle]
            if request.output is not None:
                request.output.append(token)
            request.first = min(request.first, self.now)
            request.last = self.now
            request.tokens += count
            if request.tokens == request.max_tokens:
                self.at(self.now, lambda request=request: self._end(session, request))  # type: ignore[misc]

    def _end(self, session: int, request: Served) -> None:
        self.engine.frontend_message(session, Done(request.number.to_bytes(16, "little")), self.now)
        if request.after is not None:
            request.after(self.now)
