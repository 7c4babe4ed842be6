"""The scheduler's policy as one object: messages and the time go in, messages come out. No I/O, no clock, no randomness.

frontends ──► Intake ──► Ledger (requests)          Planner ──► PLAN ──► workers
                 │           ▲                          ▲
                 └► arrivals (hashed, routed) ──► queues┘     RESULT ──► results.take ──► TOKENS
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from math import inf

from protocol.columns import unpack
from protocol.counters import Counters
from protocol.messages import (
    Abort,
    Attach,
    Credit,
    Done,
    Failed,
    FileChunk,
    FileRequest,
    Hello,
    Message,
    ModelInfo,
    Models,
    Phase,
    Progress,
    Ready,
    Result,
    Resumed,
    Submit,
)
from scheduler_svc.files import FileRelay
from scheduler_svc.frontends import Frontend, Frontends
from scheduler_svc.intake import Intake
from scheduler_svc.ledger import Ledger, Timers
from scheduler_svc.models import Model
from scheduler_svc.planner import Planner, detach_forks
from scheduler_svc.prefix import Chain, Hasher
from scheduler_svc.requests import Choice, Request, State
from scheduler_svc.results import BadResult, take
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.suspects import Suspects
from scheduler_svc.waiting import Shares
from scheduler_svc.worker import Worker

log = logging.getLogger(__name__)

CREDIT_STEPS = 8  # a frontend's credit, in steps of all slots and plans in flight
HASHED_BLOCKS = 256  # named between two plans: 0.2 ms
ARRIVALS = 64  # choices routed between two plans
LATE = 0.05  # seconds: our own delay that makes us an unfair judge of a worker's progress


class Engine:
    """Queues, blocks, plans and results of all workers and frontends."""

    def __init__(self, settings: SchedulerSettings, counters: Counters, unacked: Callable[[int], int]) -> None:
        """`unacked(session)`: tokens sent on a frontend's session and not yet taken off its link."""
        self.hash_key = b""
        self.fence: list[tuple[int, str]] = []  # sessions to be ended, and why
        self.settings = settings
        self.counters = counters
        self.workers: dict[int, Worker] = {}
        self.models: dict[str, Model] = {}
        self.shares = Shares()
        self.frontends = Frontends(unacked)
        self.frontends.limit = CREDIT_STEPS * settings.depth * settings.max_num_seqs
        self.timers = Timers()
        self.ledger = Ledger(counters, self.timers, settings.times.grace)
        self.suspects = Suspects()
        self.files = FileRelay(self.ledger, self.frontends)
        self.intake = Intake(settings, self.ledger, self.frontends, self.models, self.shares, counters, self._enqueue)
        self.intake.waiting = self._waiting
        self.intake.loading = self._loading
        self._arrivals: deque[tuple[Choice, int]] = deque()  # on their way into a queue, with their tokens
        self._arriving_tokens = 0
        self._told: list[ModelInfo] = []
        self._started = False

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
            times = self.settings.times
            self.intake.attach_hold_until = now + times.silence + times.resync + times.reconnect
            self.timers.at(self.intake.attach_hold_until, self.intake.release_attaches)

    # ------------------------------------------------------------ frontends

    def frontend_opened(self, session: int, name: str, incarnation: int, now: float) -> None:
        """A frontend's session is open; it hears which models there are."""
        self._start(now)
        self.frontends.open(session, name, incarnation)
        self.out.append((session, Models(self._infos()), 0))

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
        match message:
            case Submit():
                self._submit(frontend, message, now)
            case Abort():
                self.intake.abort(frontend, message, now)
            case Done():
                self.intake.done(frontend, message, now)
            case Attach():
                self.intake.attach(frontend, message, now)
            case Resumed():
                self.intake.resumed(frontend, message, now)
            case FileRequest():
                self.files.request(session, message, list(self.workers.values()))
            case _:
                self.counters.add("scheduler_unexpected_message")

    def _submit(self, frontend: Frontend, message: Submit, now: float) -> None:
        """A fault of ours in handling one request ends that request, not the service."""
        try:
            self.intake.submit(frontend, message, now)
        except Exception:
            self.counters.add("scheduler_faults")
            log.exception("request %s could not be taken", message.request.hex())
            failed = Failed(message.request, 500, "internal_error", "The scheduler failed at this request.")
            request = self.ledger.requests.get(message.request)
            if request is None:
                self.ledger.send(frontend, failed)
            else:
                self.ledger.fail(request, now, failed.status, failed.code, failed.reason)

    # ------------------------------------------------------------ workers

    def worker_opened(self, session: int, hello: Hello, now: float) -> None:
        """A worker's session is open; it loads until READY."""
        self._start(now)
        self.workers[session] = Worker(session, hello.name, hello.incarnation, self.shares)
        self._fail_suspects(self.suspects.returned(hello), now)
        self._announce()

    def worker_message(self, session: int, message: Message, now: float) -> None:
        """A message of a worker's open session, checked."""
        worker = self.workers.get(session)
        if worker is None or worker.fenced:
            self.counters.add("scheduler_unknown_session")
            return
        match message:
            case Result() if worker.ready:
                self._result(worker, message, now)
            case Progress():
                if (message.step, message.counter) != worker.counter:
                    worker.counter = (message.step, message.counter)
                    worker.heard = now
            case Phase():
                worker.phase = message.name
                worker.heard = now
            case Ready() if not worker.ready:
                self._ready(worker, message, now)
            case FileChunk():
                self.files.chunk(message)
            case _:
                self.counters.add("scheduler_unexpected_message")

    def worker_closed(self, session: int, reason: str, now: float) -> None:
        """The worker is lost to this session: its choices wait again, from their known tokens."""
        worker = self.workers.pop(session, None)
        if worker is None:
            return
        fatal = self.suspects.lost(worker, worker.hung)
        if worker.ready:
            self.counters.add("scheduler_workers_lost")
            worker.model.workers.remove(worker)
            worker.model.lost_at = now
            for choice in self._strip(worker):
                self._enqueue(choice, now)
        self._fail_suspects(fatal, now)
        self.files.lost(session, list(self.workers.values()))
        self._announce()
        self._review(now)

    def _strip(self, worker: Worker) -> list[Choice]:
        """Take everything from a worker that is gone; returns the choices that must go elsewhere."""
        for flight in worker.in_flight:
            for index, n in flight.credit:
                self.frontends.at(index).in_flight -= n
        worker.in_flight.clear()
        for choice in [choice for choice in worker.slots.choice if choice is not None]:
            detach_forks(worker, choice)
            worker.unbind(choice.slot)
            worker.queue.add(choice)
        homeless = list(worker.queue)
        for choice in homeless:
            worker.queue.remove(choice)
        for request in self.ledger.requests.values():
            for choice in request.choices:
                if choice.worker is worker:
                    choice.worker = None
                    choice.cached_record = 0
        return homeless

    def _ready(self, worker: Worker, message: Ready, now: float) -> None:
        model = self.models.get(message.model)
        if model is None:
            model = self.models[message.model] = Model(message.model, self.shares)
        refusal = model.refusal(message)
        if refusal:
            self._fence(worker, refusal)
            return
        settings = self.settings
        worker.open(model, message.geometry, self.intake.hasher, settings)
        worker.phase, worker.heard = "serving", now
        if settings.enable_prefix_caching:
            for block, at in zip(unpack(message.blocks).tolist(), range(0, len(message.hashes), 16), strict=True):
                if worker.blocks.adopt(block, message.hashes[at : at + 16]):
                    self.counters.add("scheduler_blocks_adopted")
                else:
                    worker.withdrawals.append(block)
        model.join(worker, message)
        self._announce()
        for choice in list(model.queue):
            model.queue.remove(choice)
            self._enqueue(choice, now)
        self._review(now)

    def _fence(self, worker: Worker, reason: str) -> None:
        worker.fenced = True
        self.fence.append((worker.session, reason))
        self.counters.add("scheduler_workers_fenced")

    def _fail_suspects(self, requests: list[Request], now: float) -> None:
        for request in requests:
            self.ledger.fail(request, now, 500, "step_failed", "The worker failed at this request each time it was tried.")

    def _watch(self, worker: Worker, due: float) -> None:
        """Judge the worker's progress at `due`."""
        worker.watched = True
        self.timers.at(due, lambda now: self._judge(worker, due, now))

    def _judge(self, worker: Worker, due: float, now: float) -> None:
        """End a session whose step has not moved. A judge that comes late has not read the latest news yet: it waits."""
        worker.watched = False
        if worker.fenced or self.workers.get(worker.session) is not worker or not worker.in_flight:
            return
        if worker.phase != "serving":
            self._watch(worker, now + self.settings.times.progress)
        elif now - due > LATE:
            self._watch(worker, now + min(now - due, self.settings.times.progress))
        elif now < self._deadline(worker):
            self._watch(worker, self._deadline(worker))
        else:
            worker.hung = True
            self._fence(worker, f"step {worker.in_flight[0].step} has made no progress for {now - worker.heard:.1f} s")

    def _deadline(self, worker: Worker) -> float:
        return worker.heard + max(self.settings.times.progress, 20 * worker.step_seconds)

    # ------------------------------------------------------------ results

    def _result(self, worker: Worker, message: Result, now: float) -> None:
        if not worker.in_flight:
            self._fence(worker, f"it answers step {message.step}, which was not planned")
            return
        try:
            taken = take(worker, message, self.frontends)
        except BadResult as bad:
            self._fence(worker, str(bad))
            return
        worker.took(message.seconds, message.idle, now)
        for frontend, tokens, weight in taken.tokens:
            self.out.append((frontend.session, tokens, weight))
        if taken.ownerless:
            self.counters.add("scheduler_rows_ownerless", taken.ownerless)
        if self.suspects.active:
            for choice in [worker.slots.choice[slot] for slot in taken.slots.tolist()]:
                if choice is not None:
                    self.suspects.clear(choice.request)
        for choice in taken.ended:
            worker.model.outputs.add(len(choice.known))
            self.ledger.stop(choice)
            self.ledger.settle(choice.request, now)
        for choice in taken.nan:
            self._nan(worker, choice, now)
        for choice in taken.drained:
            worker.queue.add(choice)

    def _nan(self, worker: Worker, choice: Choice, now: float) -> None:
        """A row's logits held a NaN: nothing it has touched may be hit again."""
        if choice.slot < 0:
            return  # its request has just failed
        self.counters.add("scheduler_nan_rows")
        s, slot = worker.slots, choice.slot
        worker.withdrawals += [block for block in s.table[slot, : s.blocks[slot]].tolist() if worker.blocks.forget(block)]
        if choice.no_hits or not choice.shared_blocks:
            self.ledger.fail(choice.request, now, 500, "nan", "The model's output for this request is not a number.")
            return
        choice.no_hits = True  # the fault may have come with a shared block
        detach_forks(worker, choice)
        worker.unbind(slot)
        worker.queue.add(choice)

    # ------------------------------------------------------------ arrivals

    def _enqueue(self, choice: Choice, now: float) -> None:
        """Let a choice wait; it is hashed and routed between plans."""
        choice.state = State.WAITING
        request = choice.request
        request.held_since = request.held_since or now
        if request.deadline and not request.admitted:
            self.timers.at(request.deadline, lambda then: self._overdue(request, then))
        self._arrivals.append((choice, choice.length))
        self._arriving_tokens += choice.length

    def _arrive(self, now: float) -> None:
        """Name some blocks of the arrivals, and let those which are complete wait at a worker."""
        blocks = HASHED_BLOCKS
        for _ in range(ARRIVALS):
            if not self._arrivals:
                return
            choice, tokens = self._arrivals[0]
            if choice.state is State.WAITING and choice.queue is None:
                blocks -= self._name(choice, blocks)
                if blocks <= 0:
                    return
                self._route(choice, now)
            self._arrivals.popleft()
            self._arriving_tokens -= tokens

    def _name(self, choice: Choice, most: int) -> int:
        """Name at most `most` blocks of the choice, for every block size among the model's workers."""
        named = 0
        if not self.settings.enable_prefix_caching:
            return named
        for size in {worker.block_size for worker in choice.request.model.workers}:
            chain = choice.chains.get(size)
            if chain is None:
                fresh = choice.request.chains.get(size) if not len(choice.tokens) else None
                chain = fresh or Chain(self.intake.hasher, size, choice.all_tokens, choice.request.root)
                choice.chains[size] = chain
                if not len(choice.tokens):
                    choice.request.chains[size] = chain
            named += chain.extend(most - named)
            if not chain.complete:
                return most
        return named

    def _route(self, choice: Choice, now: float) -> None:
        worker = choice.request.model.route(choice)
        if worker is not None:
            worker.queue.add(choice)
            choice.request.held_since = 0.0
            return
        choice.request.model.queue.add(choice)
        self._hold(choice.request, now)

    def _hold(self, request: Request, now: float) -> None:
        """Judge a request that no ready worker can take: is it worth waiting?"""
        model, times = request.model, self.settings.times
        if request.ended or not any(choice.queue is model.queue for choice in request.choices):
            return
        settled = max(model.lost_at + times.move, now) if model.lost_at > -inf else now
        if not request.admitted and not self._loading() and settled <= now:
            if model.ready is not None and not model.fits(request):
                reason = f"The prompt of {len(request.prompt)} tokens and max_tokens of {request.params.max_tokens} exceed"
                self.ledger.fail(request, now, 400, "context_length_exceeded", f"{reason} the {model.longest} tokens that fit.", "prompt")
                return
            if model.ready is None and any(other.ready is not None for other in self.models.values()):
                self.ledger.fail(request, now, 404, "model_not_found", f"The model {model.name!r} does not exist.", "model")
                return
        end = request.held_since + times.hold
        if now >= end:
            self.ledger.fail(request, now, 503, "no_worker", "No worker has been able to take the request.", retry_after=times.move)
            return
        self.timers.at(min(end, settled) if settled > now else end, lambda then: self._hold(request, then))

    def _review(self, now: float) -> None:
        """Workers have changed: judge again what waits for one."""
        for model in self.models.values():
            for request in {choice.request for choice in model.queue}:
                self._hold(request, now)

    def _overdue(self, request: Request, now: float) -> None:
        if not request.admitted:
            self.ledger.fail(request, now, 503, "deadline_exceeded", "The request waited longer than its deadline allows.")

    def _steal(self, worker: Worker) -> None:
        """An idle worker takes the first in line of one that has no room."""
        for other in worker.model.workers:
            if other is worker or not other.queue or (other.slots.free and other.stuck is None):
                continue
            choice = other.queue.first(lambda _: False, 0)
            if choice is None:
                continue
            chained = not self.settings.enable_prefix_caching or (
                worker.block_size in choice.chains and choice.chains[worker.block_size].complete
            )
            if choice.limit <= worker.capacity and chained:
                other.queue.remove(choice)
                if choice.worker is not None:
                    choice.worker.drop_record(choice)
                worker.queue.add(choice)
                return

    # ------------------------------------------------------------ plans

    def schedule(self, now: float) -> bool:
        """Make plans for every ready worker that has something to do and room in its pipeline. Whether any was made."""
        self._arrive(now)
        queued: dict[int, int] = {}
        for session, _, weight in self.out:
            if weight:
                queued[session] = queued.get(session, 0) + weight
        self.frontends.queued = queued
        made = False
        for worker in self.workers.values():
            while worker.ready and not worker.fenced and len(worker.in_flight) < self.settings.depth and self._plan(worker, now):
                made = True
        return made

    def _plan(self, worker: Worker, now: float) -> bool:
        if not worker.queue and len(worker.model.workers) > 1 and worker.slots.free:
            self._steal(worker)
        group = 0
        if self.suspects.active:
            group = self.suspects.group_at(worker, self.frontends)
            if group and worker.in_flight:
                return False
        threshold = self.settings.long_prefill_token_threshold
        plan = Planner(worker, self.frontends, self.counters, threshold, group).make(now)
        if plan is None and group:
            plan = Planner(worker, self.frontends, self.counters, threshold, 0).make(now)
        if plan is None:
            return False
        self.out.append((worker.session, plan, 0))
        if not worker.watched:
            self._watch(worker, self._deadline(worker))
        return True

    # ------------------------------------------------------------ time

    def tick(self, now: float) -> None:
        """Do what is due."""
        self.timers.tick(now)

    def next_time(self) -> float:
        """When `tick` or `schedule` is due next; inf if never."""
        return -inf if self._arrivals else self.timers.next_time()

    # ------------------------------------------------------------ what others see

    def _loading(self) -> int:
        return sum(not worker.ready for worker in self.workers.values())

    def _waiting(self) -> tuple[int, int]:
        queues = [model.queue for model in self.models.values()] + [w.queue for w in self.workers.values()]
        choices = sum(len(queue) for queue in queues) + len(self._arrivals)
        return choices, sum(queue.tokens for queue in queues) + self._arriving_tokens

    def _infos(self) -> list[ModelInfo]:
        loading = self._loading()
        return [info for info in (model.info(loading) for model in self.models.values()) if info is not None]

    def _announce(self) -> None:
        """Tell the frontends what has changed: the models, and their credit."""
        infos = self._infos()
        if infos != self._told:
            self._told = infos
            for session in self.frontends.by_session:
                self.out.append((session, Models(infos), 0))
        slots = sum(worker.slots.count for worker in self.workers.values() if worker.ready)
        limit = CREDIT_STEPS * self.settings.depth * max(slots, self.settings.max_num_seqs)
        if limit != self.frontends.limit:
            self.frontends.limit = limit
            for session in self.frontends.by_session:
                self.out.append((session, Credit(limit), 0))

    def stats(self) -> dict[str, float]:
        """Gauges and counts for /metrics; blocks and slots are summed over workers."""
        ready = [worker for worker in self.workers.values() if worker.ready]
        busy, idle = sum(w.busy_seconds for w in ready), sum(w.idle_seconds for w in ready)
        count = self.counters.get
        return {
            "requests_waiting": self._waiting()[0],
            "requests_running": sum(w.running for w in ready),
            "requests_finished": self.ledger.finished,
            "requests_failed": self.ledger.failed,
            "requests_aborted": self.ledger.aborted,
            "blocks": sum(w.blocks.count for w in ready),
            "blocks_free": sum(w.blocks.free for w in ready),
            "blocks_cached": sum(w.blocks.cached for w in ready),
            "blocks_used": sum(w.blocks.used for w in ready),
            "plans_in_flight": sum(len(w.in_flight) for w in ready),
            "workers_ready": len(ready),
            "workers_loading": self._loading(),
            "busy_share": busy / (busy + idle) if busy else 0.0,
            "preemptions": count("scheduler_preemptions", 0),
            "prefix_queries": count("scheduler_prefix_queries", 0),
            "prefix_hits": count("scheduler_prefix_hits", 0),
        }

    def check(self) -> None:
        """Verify that accounts, tables, queues and states agree. Raises AssertionError."""
        in_flight: dict[int, int] = {}
        for worker in self.workers.values():
            for flight in worker.in_flight:
                for index, n in flight.credit:
                    in_flight[index] = in_flight.get(index, 0) + n
                assert sum(n for _, n in flight.credit) == len(flight.slots), "credit does not match the rows in flight"
            if worker.ready:
                worker.check()
        for frontend in self.frontends.by_index:
            if frontend is not None:
                assert frontend.in_flight == in_flight.get(frontend.index, 0), "credit does not match the rows in flight"
                assert frontend.unsent == sum(request.unsent for request in frontend.requests.values())
        arriving = {id(choice) for choice, _ in self._arrivals}
        for request in self.ledger.requests.values():
            assert request.frontend.requests.get(request.id) is request
            assert request.ended == all(choice.state is State.ENDED for choice in request.choices), (
                "a request has not ended with its choices"
            )
            forking = {id(fork) for choice in request.choices for fork in choice.forks}
            for choice in request.choices:
                place = {
                    State.WAITING: choice.queue is not None or id(choice) in arriving,
                    State.FORKING: id(choice) in forking,
                    State.RUNNING: choice.slot >= 0,
                    State.DRAINING: choice.slot >= 0,
                    State.ENDED: choice.queue is None and choice.slot < 0 and not choice.forks,
                }
                assert place[choice.state], f"a choice is {choice.state.value}, and nowhere"
