"""Every request this scheduler has, and how requests end: once, and kept until the frontend has handed over the end."""

from __future__ import annotations

import heapq
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from math import inf

from protocol.counters import Counters
from protocol.messages import Failed, Message
from scheduler_svc.frontends import Frontend
from scheduler_svc.models import Totals
from scheduler_svc.preemption import detach_forks
from scheduler_svc.requests import Choice, Request, State

log = logging.getLogger("scheduler")

KEPT_BYTES = 64 << 20  # ended requests are kept up to this size, oldest out first


class Timers:
    """What is to be done when. Entries are never taken back: an action looks whether it still applies."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0

    def at(self, time: float, action: Callable[[float], None]) -> None:
        """Call `action(now)` at the first tick not before `time`."""
        self._count += 1
        heapq.heappush(self._heap, (time, self._count, action))

    def tick(self, now: float) -> None:
        """Do what is due."""
        while self._heap and self._heap[0][0] <= now:
            heapq.heappop(self._heap)[2](now)

    def next_time(self) -> float:
        """When the next action is due; inf if there is none."""
        return self._heap[0][0] if self._heap else inf


class Ledger:
    """Requests by id, and their ends."""

    def __init__(self, counters: Counters, totals: Totals, timers: Timers, grace: float) -> None:
        self.totals = totals
        self.requests: dict[bytes, Request] = {}
        self.out: deque[tuple[int, Message, int]] = deque()  # (session, message, tokens in it)
        self._counters = counters
        self._timers = timers
        self._grace = grace
        self._kept: OrderedDict[bytes, int] = OrderedDict()  # ended requests -> bytes
        self._kept_bytes = 0

    def later(self, time: float, request: Request, action: Callable[[Request, float], None]) -> None:
        """Call `action(request, now)` at `time`, if the request is still here then. Until then nothing keeps it."""
        id, number = request.id, request.number

        def due(now: float) -> None:
            there = self.requests.get(id)
            if there is not None and there.number == number:
                action(there, now)

        self._timers.at(time, due)

    def send(self, frontend: Frontend, message: Message, weight: int = 0) -> None:
        """Send to a frontend, if its session is open; if not, it resubmits and is answered then."""
        if frontend.session:
            self.out.append((frontend.session, message, weight))

    def add(self, request: Request) -> None:
        """Enter a new request."""
        self.requests[request.id] = request
        request.frontend.requests[request.id] = request

    def stop(self, choice: Choice) -> None:
        """End a choice: no further row, its blocks and slot are free for the next plan. The request's end is `settle`."""
        if choice.state is State.ENDED:
            return
        if choice.state is State.FORKING:
            for sibling in choice.request.choices:
                if choice in sibling.forks:
                    sibling.forks.remove(choice)
        choice.state = State.ENDED
        if choice.queue is not None:
            choice.queue.remove(choice)
        if choice.worker is not None:
            if choice.slot >= 0:
                choice.worker.unbind(choice.slot)
            detach_forks(choice.worker, choice)
            choice.worker.host.void(choice)
            choice.worker.drop_record(choice)
        choice.chains = {}

    def settle(self, request: Request, now: float, aborted: bool = False) -> None:
        """End the request if all its choices have ended."""
        if request.ended or any(choice.state is not State.ENDED for choice in request.work):
            return
        request.ended = True
        request.chains = {}
        if request.failure is not None:
            self.totals.failed += 1
        elif aborted:
            self.totals.aborted += 1
        else:
            self.totals.finished += 1
        self._kept[request.id] = request.size
        self._kept_bytes += request.size
        self.later(now + self._grace, request, lambda kept, _: self.forget(kept))
        while self._kept_bytes > KEPT_BYTES:
            self.forget(self.requests[next(iter(self._kept))])

    def fail(self, request: Request, now: float, status: int, code: str, reason: str, param: str = "", retry_after: float = 0.0) -> None:
        """End the request with an error, unless it has ended."""
        if request.ended:
            return
        request.failure = Failed(request.id, status, code, reason, param, retry_after)
        log.info("request failed", extra={"request": request.id.hex(), "status": status, "code": code})
        for choice in request.work:
            self.stop(choice)
        self.settle(request, now)
        self.send(request.frontend, request.failure)

    def abort(self, request: Request, now: float) -> None:
        """End all choices, by the will of its frontend or for want of one."""
        for choice in request.work:
            self.stop(choice)
        self.settle(request, now, aborted=True)

    def forget(self, request: Request) -> None:
        """Drop an ended request."""
        assert request.ended
        if self.requests.get(request.id) is request:
            del self.requests[request.id]
            request.frontend.requests.pop(request.id, None)
            request.frontend.unsent -= request.unsent
            request.unsent = 0
            self._kept_bytes -= self._kept.pop(request.id)
            # it and these refer to each other: it would wait for the garbage collector
            request.choices, request.scorer = [], None
