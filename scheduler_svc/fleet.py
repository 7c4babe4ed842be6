"""Workers that come, get ready, leave on purpose, and are lost: what becomes of the choices they had."""

from __future__ import annotations

from protocol.columns import unpack
from protocol.counters import Counters
from protocol.messages import Hello, Ready
from scheduler_svc.arrivals import Arrivals
from scheduler_svc.draining import is_empty, move_away
from scheduler_svc.frontends import Frontends
from scheduler_svc.ledger import Ledger
from scheduler_svc.models import Model
from scheduler_svc.preemption import detach_forks
from scheduler_svc.requests import Choice, Request
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.suspects import Suspects
from scheduler_svc.waiting import Shares
from scheduler_svc.worker import Worker


class Fleet:
    """The workers' sessions."""

    def __init__(
        self,
        settings: SchedulerSettings,
        ledger: Ledger,
        frontends: Frontends,
        models: dict[str, Model],
        shares: Shares,
        counters: Counters,
        suspects: Suspects,
        arrivals: Arrivals,
    ) -> None:
        self.workers: dict[int, Worker] = {}
        self.ending: list[tuple[int, str]] = []  # sessions to be ended, and why
        self._settings = settings
        self._ledger = ledger
        self._frontends = frontends
        self._models = models
        self._shares = shares
        self._counters = counters
        self._suspects = suspects
        self._arrivals = arrivals

    def open(self, session: int, hello: Hello, now: float) -> None:
        """A worker's session is open; it loads until READY."""
        self.workers[session] = Worker(session, hello.name, hello.incarnation, self._shares, hello.protocol)
        self._fail(self._suspects.returned(hello), now)

    def ready(self, worker: Worker, message: Ready, now: float) -> None:
        """It can serve; what waited for one is routed anew."""
        model = self._models.get(message.model)
        if model is None:
            model = self._models[message.model] = Model(message.model, self._shares, self._ledger.totals.tally(message.model))
        refusal = model.refusal(message)
        if refusal:
            self.fence(worker, refusal)
            return
        try:
            worker.open(model, message.geometry, self._arrivals.hasher, self._settings)
        except MemoryError:
            slots, length = message.geometry.slots, message.geometry.max_model_len
            self.fence(worker, f"{slots} slots of {length} tokens take more memory than the scheduler has")
            return
        worker.phase, worker.heard = "serving", now
        if worker.caching:
            for block, name in _named(message.blocks, message.hashes):
                if worker.blocks.adopt(block, name):
                    self._counters.add("scheduler_blocks_adopted")
                else:
                    worker.withdrawals.append(block)
            for block, name in _named(message.host_blocks, message.host_hashes):
                if worker.host.pool.adopt(block, name):
                    self._counters.add("scheduler_host_blocks_adopted")
        model.join(worker, message)
        for choice in list(model.queue):
            if reason := model.objection(choice.request.submit):
                self._ledger.fail(choice.request, now, 400, "invalid_token", reason, "prompt")
            elif choice.queue is model.queue:
                model.queue.remove(choice)
                self._arrivals.enqueue(choice, now)
        self._arrivals.review(now)

    def leave(self, worker: Worker) -> None:
        """The worker wants to go: `drain` takes from it what it has."""
        if worker.ready and not worker.leaving:
            worker.model.workers.remove(worker)
            self._counters.add("scheduler_workers_leaving")
        worker.leaving = True

    def drain(self, worker: Worker, now: float) -> bool:
        """Take from a leaving worker what can be taken now. Whether it has just become free to go."""
        if worker.ready:
            move_away(worker, self._arrivals, now)
        if worker.drained or (worker.ready and not is_empty(worker)):
            return False
        worker.drained = True
        return True

    def fence(self, worker: Worker, reason: str) -> None:
        """Nothing more is taken from this session; it is to be ended."""
        worker.fenced = True
        self.ending.append((worker.session, reason))
        self._counters.add("scheduler_workers_fenced")

    def close(self, session: int, now: float) -> bool:
        """The session is over: its choices wait again, from their known tokens. False if it was none of a worker."""
        worker = self.workers.pop(session, None)
        if worker is None:
            return False
        worker.closed = True
        fatal = self._suspects.lost(worker, worker.hung)
        if worker.ready:
            self._counters.add("scheduler_workers_drained" if worker.drained else "scheduler_workers_lost")
            if not worker.leaving:
                worker.model.lose(worker, now)
            self._arrivals.leave(worker, self._strip(worker), now)
        self._fail(fatal, now)
        self._arrivals.review(now)
        return True

    def _strip(self, worker: Worker) -> list[Choice]:
        """Take everything from a worker that is gone; returns the choices that must go elsewhere."""
        for flight in worker.in_flight:
            for index, n in flight.credit:
                self._frontends.at(index).in_flight -= n
        worker.in_flight.clear()
        for choice in [choice for choice in worker.slots.choice if choice is not None]:
            detach_forks(worker, choice)
            worker.unbind(choice.slot)
            worker.queue.add(choice)
        homeless = list(worker.queue)
        for choice in homeless:
            worker.queue.remove(choice)
        for request in self._ledger.requests.values():
            for choice in request.work:
                if choice.worker is worker:
                    choice.worker = choice.swap = None
                    choice.cached_record = 0
        return homeless

    def _fail(self, requests: list[Request], now: float) -> None:
        for request in requests:
            self._ledger.fail(request, now, 500, "step_failed", "The worker failed at this request each time it was tried.")


def _named(blocks: bytes, hashes: bytes) -> list[tuple[int, bytes]]:
    """The sealed blocks that READY lists, with their names."""
    return [(block, hashes[16 * i : 16 * i + 16]) for i, block in enumerate(unpack(blocks).tolist())]
