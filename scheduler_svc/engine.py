"""The scheduler's policy as one object: messages and the time go in, messages come out. No I/O, no clock, no randomness.

frontends ──► Intake ──► Ledger (requests)          Planner ──► PLAN ──► workers (Fleet)
                 │           ▲                          ▲
                 └► arrivals (hashed, routed) ──► queues┘     RESULT ──► Outcomes ──► TOKENS
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from math import inf

from protocol.counters import Counters
from protocol.messages import (
    Abort,
    Attach,
    Done,
    Drained,
    Failed,
    FileChunk,
    FileRequest,
    Hello,
    Message,
    Phase,
    Progress,
    Ready,
    Result,
    Resumed,
    Scored,
    Submit,
)
from protocol.series import Series
from scheduler_svc import inspection
from scheduler_svc.announcements import Announcements
from scheduler_svc.arrivals import Arrivals
from scheduler_svc.files import FileRelay
from scheduler_svc.fleet import Fleet
from scheduler_svc.frontends import Frontend, Frontends
from scheduler_svc.intake import Intake
from scheduler_svc.ledger import Ledger, Timers
from scheduler_svc.models import Model, Totals
from scheduler_svc.outcomes import Outcomes
from scheduler_svc.planner import Planner
from scheduler_svc.prefix import Hasher
from scheduler_svc.progress import Progress as ProgressWatch
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.suspects import Suspects
from scheduler_svc.waiting import Shares
from scheduler_svc.worker import Worker

log = logging.getLogger(__name__)


class Engine:
    """Queues, blocks, plans and results of all workers and frontends."""

    def __init__(
        self, settings: SchedulerSettings, counters: Counters, unacked: Callable[[int], int], totals: Totals | None = None
    ) -> None:
        """`unacked(session)`: tokens sent on a frontend's session and not yet taken off its link.

        `counters` and `totals` are the scheduler's, and go on where an earlier engine left them.
        """
        self.hash_key = b""
        self.settings = settings
        self.counters = counters
        self.models: dict[str, Model] = {}
        self.shares = Shares()
        self.frontends = Frontends(unacked)
        self.timers = Timers()
        self.ledger = Ledger(counters, totals or Totals(), self.timers, settings.times.grace)
        self.suspects = Suspects()
        self.files = FileRelay(self.ledger, self.frontends)
        self.arrivals = Arrivals(settings, self.ledger, self.models, counters, self.loading)
        self.fleet = Fleet(settings, self.ledger, self.frontends, self.models, self.shares, counters, self.suspects, self.arrivals)
        self.workers = self.fleet.workers
        self.fence = self.fleet.ending
        self.outcomes = Outcomes(self.ledger, self.frontends, self.suspects, counters, self.fleet.fence)
        self.progress = ProgressWatch(settings.times, self.timers, self.fleet.fence)
        self.intake = Intake(settings, self.ledger, self.frontends, self.models, self.shares, counters, self.arrivals)
        self._announcements = Announcements(settings, self.ledger, self.frontends, self.models, self.workers)
        self._started = False
        self._integrity = inspection.IntegrityCheck(self)

    @property
    def out(self) -> deque[tuple[int, Message, int]]:
        """Messages to send: (session, message, tokens in it)."""
        return self.ledger.out

    @property
    def credit_limit(self) -> int:
        """Tokens a frontend may have outstanding."""
        return self.frontends.limit

    def _start(self, now: float) -> None:
        if not self._started:
            self._started = True
            self.intake.hasher = Hasher(self.hash_key)
            self.arrivals.begin(self.intake.hasher)
            times = self.settings.times
            self.intake.attach_hold_until = now + times.silence + times.resync + times.reconnect
            self.timers.at(self.intake.attach_hold_until, self.intake.release_attaches)

    # ------------------------------------------------------------ frontends

    def frontend_opened(self, session: int, name: str, incarnation: int, now: float) -> None:
        """A frontend's session is open; it hears which models there are."""
        self._start(now)
        self.frontends.open(session, name, incarnation)
        self._announcements.greet(session)

    def frontend_closed(self, session: int, now: float) -> None:
        """Its requests run on within its credit until the grace ends."""
        frontend = self.frontends.close(session)
        if frontend is not None:
            self.timers.at(now + self.settings.times.grace, lambda then: self._give_up(frontend, then))
            self.frontends.sweep()

    def _give_up(self, frontend: Frontend, now: float) -> None:
        for request in list(frontend.requests.values()):
            self.counters.add("scheduler_orphans_aborted")
            self.ledger.abort(request, now)
            self.ledger.forget(request)
        self.frontends.sweep()

    def frontend_message(self, session: int, message: Message, now: float) -> None:
        """A message of a frontend's open session, checked."""
        frontend = self.frontends.by_session.get(session)
        if frontend is None:
            self.counters.add("scheduler_unknown_session")
            return
        try:
            self._take(frontend, message, now)
        except Exception:
            self.counters.add("scheduler_faults")
            log.exception("a message of frontend %s could not be taken", frontend.name)
            if isinstance(message, Submit | Abort | Done | Attach):
                self._end_by_fault(frontend, message.request, now)

    def _take(self, frontend: Frontend, message: Message, now: float) -> None:
        match message:
            case Submit():
                self.intake.submit(frontend, message, now)
            case Abort():
                self.intake.abort(frontend, message, now)
            case Done():
                self.intake.done(frontend, message, now)
            case Attach():
                self.intake.attach(frontend, message, now)
            case Resumed():
                self.intake.resumed(frontend, message, now)
            case FileRequest():
                self.files.request(frontend.session, message, list(self.workers.values()))
            case _:
                self.counters.add("scheduler_unexpected_message")

    def _end_by_fault(self, frontend: Frontend, id: bytes, now: float) -> None:
        """A fault of ours in handling one request ends that request, not the service."""
        failed = Failed(id, 500, "internal_error", "The scheduler failed at this request.")
        request = self.ledger.requests.get(id)
        if request is None:
            self.ledger.send(frontend, failed)
        else:
            self.ledger.fail(request, now, failed.status, failed.code, failed.reason)

    # ------------------------------------------------------------ workers

    def worker_opened(self, session: int, hello: Hello, now: float) -> None:
        """A worker's session is open; it loads until READY."""
        self._start(now)
        self.fleet.open(session, hello, now)
        self._announcements.changed()

    def worker_message(self, session: int, message: Message, now: float) -> None:
        """A message of a worker's open session, checked."""
        worker = self.workers.get(session)
        if worker is None or worker.fenced:
            self.counters.add("scheduler_unknown_session")
            return
        match message:
            case Result() if worker.ready:
                if self.outcomes.result(worker, message, now):
                    self._announcements.changed()
            case Scored() if worker.ready:
                self.outcomes.scored(worker, message, now)
            case Progress():
                if (message.step, message.counter) != worker.counter:
                    worker.counter = (message.step, message.counter)
                    worker.heard = now
            case Phase(name="draining"):
                self.fleet.leave(worker)
                self._announcements.changed()
            case Phase():
                worker.phase = message.name
                worker.heard = now
            case Ready() if not worker.ready and not worker.leaving:
                self.fleet.ready(worker, message, now)
                self._announcements.changed()
            case FileChunk():
                self.files.chunk(message)
            case _:
                self.counters.add("scheduler_unexpected_message")

    def worker_closed(self, session: int, reason: str, now: float) -> None:
        """The worker is lost to this session: its choices wait again, from their known tokens."""
        if self.fleet.close(session, now):
            self.files.lost(session, list(self.workers.values()))
            self._announcements.changed()

    # ------------------------------------------------------------ plans

    def schedule(self, now: float, made_one: Callable[[bool], None] = lambda more: None) -> bool:
        """Make plans for every ready worker that has something to do and room in its pipeline. Whether any was made.

        `made_one(more)` is called behind each, which stands last in `out`; `more`: the pipeline has room for another one.
        """
        self.arrivals.advance(now)
        queued: dict[int, int] = {}
        for session, _, weight in self.out:
            if weight:
                queued[session] = queued.get(session, 0) + weight
        self.frontends.queued = queued
        made = False
        for worker in self.workers.values():
            if worker.leaving and not worker.fenced:
                self._drain(worker, now)
            while worker.ready and not worker.fenced and len(worker.in_flight) < worker.depth.plans and self._plan(worker, now):
                made = True
                made_one(len(worker.in_flight) < worker.depth.plans)
        if made:
            self._integrity.stirred = True
        elif self.settings.check_when_idle:
            self._integrity.unplanned(now)
        return made

    def _drain(self, worker: Worker, now: float) -> None:
        if self.fleet.drain(worker, now):
            self.out.append((worker.session, Drained(), 0))
            if worker.ready and self.settings.check_when_idle:
                self._integrity.verify(worker.check)

    def _plan(self, worker: Worker, now: float) -> bool:
        if not worker.queue and len(worker.model.workers) > 1 and not worker.leaving and not worker.proving and worker.slots.free:
            self.arrivals.steal(worker)
        group = 0
        if self.suspects.active:
            group = self.suspects.group_at(worker, self.frontends)
            if group and worker.in_flight:
                return False
        plan = Planner(worker, self.frontends, self.counters, self.settings, group).make(now)
        if plan is None and group:
            plan = Planner(worker, self.frontends, self.counters, self.settings, 0).make(now)
        if plan is None:
            return False
        self.out.append((worker.session, plan, 0))
        self.progress.planned(worker)
        return True

    # ------------------------------------------------------------ time

    def tick(self, now: float) -> None:
        """Do what is due."""
        self.timers.tick(now)

    def next_time(self) -> float:
        """When `tick` or `schedule` is due next; inf if never."""
        return -inf if self.arrivals else self.timers.next_time()

    # ------------------------------------------------------------ what others see

    def loading(self) -> int:
        """Workers that have not said READY yet."""
        return self._announcements.loading()

    @property
    def at_rest(self) -> bool:
        """Whether nothing is left to do."""
        return inspection.rests(self)

    def stats(self) -> dict[str, float]:
        """Gauges and counts for /metrics."""
        return inspection.stats(self)

    def series(self) -> list[Series]:
        """The same by model, under vLLM's names."""
        return inspection.series(self)

    def pictures(self) -> dict[str, bytes]:
        """The blocks of each ready worker, in brief."""
        return inspection.pictures(self)

    def check(self) -> None:
        """Verify that accounts, tables, queues and states agree. Raises AssertionError."""
        inspection.check(self)
