"""A worker in the simulation, with the oracle runner."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

from gpu_worker.core import WorkerCore, scored
from gpu_worker.oracle import OracleRunner, StepError
from gpu_worker.runner import Step
from gpu_worker.settings import WorkerSettings
from protocol.columns import unpack
from protocol.listener import WORKERS
from protocol.messages import Drained, FileRequest, Phase, Plan, Progress
from protocol.sessions import Closed, Event, Opened, Received
from protocol.times import Times
from tests.simulation.broken import DRAIN, MESSAGE, Broken
from tests.simulation.clock import Clock
from tests.simulation.network import Network
from tests.simulation.nodes import SOON, PeerNode


class WorkerNode(PeerNode):
    """A worker with the oracle runner. The device takes `step_time` a step; plans are applied as they arrive."""

    socket = WORKERS
    channels = 2
    role = "worker"

    def __init__(
        self,
        name: str,
        clock: Clock,
        network: Network,
        schedulers: list[str],
        incarnation: int,
        times: Times,
        settings: WorkerSettings,
        step_time: Callable[[], float],
        marks: dict[int, str] | None = None,
        poison_from: int = 0,
        on_crash: Callable[[WorkerNode], None] | None = None,
        on_leave: Callable[[WorkerNode], None] | None = None,
    ) -> None:
        super().__init__(name, clock, network, schedulers, incarnation, times)
        # What would end this process is judged before the runner sees it (`_poison`).
        self.runner = OracleRunner(
            settings, marks={t: e for t, e in (marks or {}).items() if e not in ("crash", "hang")}, clock=lambda: 0.0
        )
        self._marks = marks or {}
        self._poison_from = poison_from
        self._on_crash = on_crash
        self._on_leave = on_leave
        self.leaving = False
        self.spoilt: set[int] = set()  # seeds of the choices in the step whose NaN comes once
        self._announced = False  # READY has been said in this session
        self.core = WorkerCore(self.runner.load())
        self.dialer.geometry = self.core.description.geometry
        self._step_time = step_time
        self._times = times
        self._running: deque[Step] = deque()
        self._busy_until = 0.0
        self._ready_pending = False
        self._hung = 0  # the step whose computation does not end
        self._progress_at = inf  # when to say that the running step still moves
        self.turn()

    def event(self, event: Event) -> None:
        match event:
            case Opened():
                if self._running or self._hung:
                    self._ready_pending = True  # READY is said once the running step has ended
                else:
                    self._say_ready()
            case Closed():
                self._ready_pending = self._announced = False
                self._progress_at = inf
                if self.leaving:  # what it had has gone with the session
                    self.clock.after(SOON, lambda: self.run(self._gone))
                if self._hung:  # the process sees that its main thread does not come back, and ends
                    self.clock.after(self._times.progress, lambda: self.run(self._give_up))
                elif not self._running:
                    self._reset()
            case Received(Plan() as plan):
                self._plan(plan)
            case Received(FileRequest() as request):
                self.dialer.send(self.core.file_chunk(request), self.clock.now)
            case Received(Drained()):
                if any(len(step.slots) for step in self._running) or self.core.records:
                    raise Broken(DRAIN, f"{self.name} is let go with work of its own")
                self._gone()
            case Received(message):
                raise Broken(MESSAGE, f"{self.name} was sent {type(message).__name__}")

    def leave(self) -> None:
        """What `pagewire drain` asks: let the scheduler take away what this worker has, then end."""
        if self.alive:
            self.leaving = True
            if self._announced:
                self.dialer.send(Phase("draining"), self.clock.now)
                self.turn()
            else:
                self._gone()

    def _gone(self) -> None:
        assert self._on_leave is not None
        if self.alive:
            self._on_leave(self)

    def _give_up(self) -> None:
        assert self._on_crash is not None
        self._on_crash(self)

    def _say_ready(self) -> None:
        self.core.welcome(self.dialer.hash_key)
        self.dialer.send(self.core.ready(), self.clock.now)
        self._announced = True

    def _reset(self) -> None:
        self.core.reset()
        self.runner.reset()

    def _plan(self, plan: Plan) -> None:
        session = self.dialer.session
        if not self._running:
            self._progress_at = self.clock.now + self._times.heartbeat
        if self._hung or self._ready_pending or not session:  # a step before it may have ended the session
            return
        effect = self._poison(plan)
        if effect == "crash":
            self._give_up()
            return
        if effect == "hang":
            self._hung = plan.step
            return
        fresh = set(self.runner._marks)
        try:
            step = self.core.apply(plan)
            self.runner.start(step)
        except StepError:
            self._running.clear()
            self.take(self.dialer.fail(plan.step, self.clock.now, f"step {plan.step} raised"))
            return
        if fresh != set(self.runner._marks):
            self.spoilt = {record.seed for record in step.records}
        self._running.append(step)
        self._busy_until = max(self.clock.now, self._busy_until) + self._step_time()
        self.clock.at(self._busy_until, lambda: self.run(lambda: self._finish(step, session)))

    def _poison(self, plan: Plan) -> str:
        """Whether computing this plan would crash or hang the process; the real runner would do it for real."""
        fatal = {token: effect for token, effect in self._marks.items() if effect in ("crash", "hang")}
        if not fatal:
            return ""
        known = {admit.record: unpack(admit.prompt).tolist() + unpack(admit.known).tolist() for admit in plan.admits}
        for id, record in self.core.records.items():
            known[id] = record.history[: record.length].tolist()
        bound = dict(zip(unpack(plan.bind_slots).tolist(), unpack(plan.bind_records).tolist(), strict=True))
        for slot, start, count in zip(unpack(plan.slots).tolist(), unpack(plan.starts).tolist(), unpack(plan.counts).tolist(), strict=True):
            held = self.core._slots.records[slot]
            id = bound.get(slot, held.id if held is not None else None)
            tokens = known.get(id, []) if id is not None else []
            for token in fatal:
                if token in tokens and start <= max(tokens.index(token), self._poison_from) < start + count:
                    return fatal[token]
        return ""

    def _finish(self, step: Step, session: int) -> None:
        if step not in self._running:
            return
        self._running.remove(step)
        outcome = self.runner.finish(step)
        result = self.core.result(step, outcome)
        if self.dialer.session == session:
            for message in scored(step, outcome):
                self.dialer.send(message, self.clock.now)
            self.dialer.send(result, self.clock.now)
            self._progress_at = self.clock.now + self._times.heartbeat if self._running else inf
        elif not self._running:
            self._reset()
            if self._ready_pending:
                self._ready_pending = False
                self._say_ready()
        self.turn()

    def deadline(self) -> float:
        return self._progress_at

    def turn(self) -> None:
        if self.clock.now >= self._progress_at:
            self._progress_at = self.clock.now + self._times.heartbeat
            if step := self._running[0].plan.step if self._running else self._hung:
                self.dialer.send(Progress(step, self.runner.counter), self.clock.now)
        super().turn()

    def crash(self) -> None:
        self._running.clear()
        super().crash()
