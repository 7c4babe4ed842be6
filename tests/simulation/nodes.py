"""The three services in the simulation: the real cores, with virtual sockets and threads around them.

Every node can crash (it is discarded), pause (SIGSTOP: what arrives waits) and be started again under the same name.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from math import inf

from frontend.entries import Entry, NewRequest
from frontend.journal import Journal
from gpu_worker.core import WorkerCore, scored
from gpu_worker.oracle import OracleRunner, StepError
from gpu_worker.runner import Step
from gpu_worker.settings import WorkerSettings
from protocol.columns import unpack
from protocol.counters import Counters
from protocol.listener import FRONTENDS, WORKERS, Route
from protocol.messages import Drained, FileRequest, Hello, Phase, Plan, Progress, Submit
from protocol.sessions import Closed, Dialer, Event, Opened, Received
from protocol.times import Times
from scheduler_svc.core import Core
from scheduler_svc.frontends import Frontends
from scheduler_svc.settings import SchedulerSettings
from tests.simulation.broken import DRAIN, MESSAGE, PROGRESS, Broken
from tests.simulation.clock import Clock
from tests.simulation.network import Connection, Frames, Network

SOON = 1e-4  # seconds: a wake-up that is overdue comes after this
SPINS = 200


class Node:
    """A process: a name, life, pauses, and a wake-up at the time its core names."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.clock = clock
        self.alive = True
        self.paused_until = 0.0
        self._wake_at = inf
        self._woken_at = -inf
        self._spins = 0  # wake-ups in a row, each as soon as it can be

    def run(self, call: Callable[[], None]) -> None:
        """Run something in this process: now, or when its pause ends; never, if it dies before."""
        if not self.alive:
            return
        if self.clock.now < self.paused_until:
            self.clock.at(self.paused_until, lambda: self.run(call))
        else:
            call()

    def pause(self, seconds: float) -> None:
        """SIGSTOP, then SIGCONT."""
        self.paused_until = max(self.paused_until, self.clock.now + seconds)

    def wake_at(self, when: float) -> None:
        """See to it that `wake` runs at a time (or earlier, if that was asked for before)."""
        if when < self._wake_at and when != inf:
            self._wake_at = when
            self.clock.at(when, lambda: self.run(self._woken))

    def _woken(self) -> None:
        if self.clock.now < self._wake_at:
            return  # an earlier wake-up has replaced this one
        self._wake_at = inf
        self._spins = self._spins + 1 if self.clock.now - self._woken_at < 2 * SOON else 0
        self._woken_at = self.clock.now
        if self._spins == SPINS:
            raise Broken(PROGRESS, f"{self.name} spins: it asks to be woken {SPINS} times in a row, with nothing to do")
        self.wake()

    def wake(self) -> None:
        raise NotImplementedError


class LittleCredit(Frontends):
    """Credit that stays as little as it is, though the engine reckons it anew within a turn."""

    little: int

    @property
    def limit(self) -> int:
        return self.little

    @limit.setter
    def limit(self, value: int) -> None:
        pass


class SchedulerNode(Node):
    """A scheduler: `Core` behind two virtual ROUTER sockets."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        network: Network,
        settings: SchedulerSettings,
        rng: random.Random,
        store: dict[str, object],
        standby: bool = False,
        credit: int = 0,
    ) -> None:
        super().__init__(name, clock)
        self._network = network
        self._store = store
        self._credit = credit
        seen = int(store.get("epoch", 0))  # type: ignore[call-overload]
        key = store.get("key", b"")
        assert isinstance(key, bytes)
        self.core = Core(
            settings,
            lambda: rng.getrandbits(62) | 1,
            self._claim,
            self._keep_key,
            clock.now,
            seen_epoch=seen << 32,
            hash_key=key,
            standby=standby,
        )
        network.schedulers[name] = self._arrive
        network.gone[name] = lambda route: self.run(lambda: self._disconnected(route))
        self.turn()

    def _claim(self, counter: int) -> int:
        claimed = 1 + max(counter, int(self._store.get("epoch", 0)))  # type: ignore[call-overload]
        self._store["epoch"] = claimed
        return claimed

    def _keep_key(self, key: bytes) -> None:
        self._store["key"] = key

    def _arrive(self, route: Route, frames: Frames) -> None:
        def take() -> None:
            self.core.receive(route, frames, self.clock.now)
            self.turn()

        self.run(take)

    def _disconnected(self, route: Route) -> None:
        self.core.disconnected(route, self.clock.now)
        self.turn()

    def wake(self) -> None:
        self.turn()

    def turn(self) -> None:
        """What the service's loop does after each batch of messages."""
        frontends = self.core.engine.frontends
        if self._credit and not isinstance(frontends, LittleCredit):
            frontends.__class__ = LittleCredit
            frontends.little = self._credit
        self.core.turn(self.clock.now)
        lost = []
        while self.core.out:
            route, frames = self.core.out.popleft()
            if not self._network.to_peer(self.name, route, frames):
                lost.append(route)
        for route in lost:
            self.core.disconnected(route, self.clock.now)
        self.wake_at(max(self.core.next_time(), self.clock.now + SOON))

    def crash(self) -> None:
        self.alive = False
        del self._network.schedulers[self.name], self._network.gone[self.name]
        self._network.restart(self.name)


class PeerNode(Node):
    """What frontends and workers share: a Dialer and its sockets towards every scheduler."""

    socket = FRONTENDS
    channels = 1
    role = "frontend"

    def __init__(self, name: str, clock: Clock, network: Network, schedulers: list[str], incarnation: int, times: Times) -> None:
        super().__init__(name, clock)
        self._network = network
        self._schedulers = schedulers
        self.counters = Counters()
        self.incarnation = incarnation
        self.dialer = Dialer(Hello(self.role, name, incarnation, 0), len(schedulers), self.channels, times, self.counters, clock.now)
        self._sockets: dict[tuple[int, int], Connection] = {}
        for endpoint in range(len(schedulers)):
            for channel in range(self.channels):
                self._connect(endpoint, channel)

    def _connect(self, endpoint: int, channel: int) -> None:
        def deliver(frames: Frames) -> None:
            def take() -> None:
                if connection.open:
                    self.take(self.dialer.receive(endpoint, channel, frames, self.clock.now))
                    self.turn()

            self.run(take)

        connection = self._network.connect(self.name, self._schedulers[endpoint], channel, self.socket, deliver)
        self._sockets[endpoint, channel] = connection

    def take(self, events: list[Event]) -> None:
        for event in events:
            self.event(event)

    def event(self, event: Event) -> None:
        raise NotImplementedError

    def wake(self) -> None:
        self.turn()

    def turn(self) -> None:
        """Timers, then transmit; sockets of an ended session are renewed."""
        self.take(self.dialer.tick(self.clock.now))
        self.transmit()
        self.wake_at(max(min(self.dialer.next_time(), self.deadline()), self.clock.now + SOON))

    def deadline(self) -> float:
        return inf

    def transmit(self) -> None:
        for endpoint, channel in sorted(self.dialer.reopen):
            self._network.close(self._sockets[endpoint, channel])
            self._connect(endpoint, channel)
        self.dialer.reopen.clear()
        for channel, queue in enumerate(self.dialer.out):
            while queue:
                endpoint, frames = queue.popleft()
                self._network.to_scheduler(self._sockets[endpoint, channel], frames)

    def lose_connections(self, scheduler: str) -> None:
        """The scheduler's process has ended: the sockets notice, and TCP reconnects."""
        if scheduler in self._schedulers:
            endpoint = self._schedulers.index(scheduler)

            def notice() -> None:
                self.take(self.dialer.disconnected(endpoint, self.clock.now))
                self.turn()

            self.run(notice)

    def crash(self) -> None:
        self.alive = False
        for connection in self._sockets.values():
            self._network.close(connection)


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
        on_crash: Callable[[WorkerNode], None] | None = None,
        on_leave: Callable[[WorkerNode], None] | None = None,
    ) -> None:
        super().__init__(name, clock, network, schedulers, incarnation, times)
        # What would end this process is judged before the runner sees it (`_poison`).
        self.runner = OracleRunner(
            settings, marks={t: e for t, e in (marks or {}).items() if e not in ("crash", "hang")}, clock=lambda: 0.0
        )
        self._marks = marks or {}
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
            for token in known.get(id, [])[start : start + count] if id is not None else []:
                if token in fatal:
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


class FrontendNode(PeerNode):
    """A frontend: the Journal, and clients that are the simulation's (`world.py`)."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        network: Network,
        schedulers: list[str],
        incarnation: int,
        times: Times,
        touched: Callable[[FrontendNode, Entry], None],
        revive: Callable[[Submit], NewRequest],
    ) -> None:
        super().__init__(name, clock, network, schedulers, incarnation, times)
        self.journal = Journal(incarnation, times, self.counters, revive)
        self.closed = False  # takes nothing new
        self._touched = touched
        self.turn()

    def event(self, event: Event) -> None:
        match event:
            case Opened(welcome):
                self.journal.opened(welcome, self.clock.now)
            case Closed():
                self.journal.closed(self.clock.now)
            case Received(message):
                self.journal.message(message, self.clock.now)
                if self.journal.fault is not None:
                    self.take(self.dialer.fail(0, self.clock.now, self.journal.fault))

    def attach(self, request: bytes, told: list[int]) -> Entry:
        entry = self.journal.attach(request, self.clock.now, told)
        self.turn()
        return entry

    def submit(self, new: NewRequest) -> Entry:
        entry = self.journal.submit(new, self.clock.now)
        self.turn()
        return entry

    def deadline(self) -> float:
        return self.journal.next_time()

    def turn(self) -> None:
        self.journal.tick(self.clock.now)
        super().turn()

    def transmit(self) -> None:
        while self.journal.out:
            self.dialer.send(self.journal.out.popleft(), self.clock.now)
        touched = list(self.journal.touched.values())
        self.journal.touched.clear()
        for entry in touched:
            self._touched(self, entry)
        while self.journal.out:
            self.dialer.send(self.journal.out.popleft(), self.clock.now)
        super().transmit()
