"""Finding the request that breaks steps, without harming its neighbours.

When a worker's session ends with plans unacknowledged, the oldest of them is held responsible: its requests are
suspects. They come back in halves, each half in steps of its own with nothing else in flight on that worker, halved
again at each failure, and are cleared by a token that becomes known. Failures of a plan that held one request alone
are counted: a lost session is one, a HELLO that names the step makes it two; four in a row end the request.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import Hello
from scheduler_svc.frontends import Frontends
from scheduler_svc.requests import Request
from scheduler_svc.steps import InFlight
from scheduler_svc.worker import Worker

FATAL = 4


@dataclass(slots=True)
class Loss:
    """A lost session, until its incarnation says HELLO again or is replaced."""

    session: int
    hung: bool
    oldest: int  # step
    requests: dict[int, list[Request]]  # of the plans that were in flight, by step


class Suspects:
    """Who is suspected, and why."""

    def __init__(self) -> None:
        self.active: set[Request] = set()
        self._groups = 0
        self._losses: dict[int, Loss] = {}  # by incarnation

    def lost(self, worker: Worker, hung: bool) -> list[Request]:
        """A session ended; call before its slots are taken away. Returns those that have failed too often."""
        if not worker.ready or not worker.in_flight:
            return []
        plans = {flight.step: _requests(worker, flight) for flight in worker.in_flight}
        oldest = worker.in_flight[0].step
        self._losses[worker.incarnation] = Loss(worker.session, hung, oldest, plans)
        while len(self._losses) > 64:
            del self._losses[next(iter(self._losses))]
        return self._strike(plans[oldest], 1)

    def returned(self, hello: Hello) -> list[Request]:
        """A worker says HELLO: judge what its last session's end meant. Returns those that have failed too often."""
        loss = self._losses.pop(hello.incarnation, None)
        if loss is None:
            return []
        named = hello.failed_session == loss.session and hello.failed_step in loss.requests
        if not named and loss.hung:
            return []
        if named and hello.failed_step == loss.oldest:
            return self._strike(loss.requests[loss.oldest], 1)
        alone = len(loss.requests[loss.oldest]) == 1
        for request in loss.requests[loss.oldest]:  # the process lives, so that step broke nothing
            request.strikes -= alone and request.strikes > 0
            if not request.strikes:
                self.clear(request)
        return self._strike(loss.requests[hello.failed_step], 2) if named else []

    def clear(self, request: Request) -> None:
        """A token of the request has become known."""
        request.strikes = request.trial = 0
        self.active.discard(request)

    def group_at(self, worker: Worker, frontends: Frontends) -> int:
        """The suspects whose turn it is at a worker: the number of the oldest one's group, or 0."""
        self.active = {request for request in self.active if not request.ended}
        here = [
            request
            for request in self.active
            if frontends.free(request.frontend) > 0
            and any(c.queue is worker.queue or (c.slot >= 0 and c.worker is worker) for c in request.work)
        ]
        return min(here, key=lambda request: request.number).trial if here else 0

    def _strike(self, requests: list[Request], strikes: int) -> list[Request]:
        living = [request for request in requests if not request.ended]
        half = (len(living) + 1) // 2
        for group in (living[:half], living[half:]):
            self._groups += 1
            for request in group:
                if len(living) == 1:  # in company, the fault may be another's
                    request.strikes += strikes
                request.trial = self._groups
                self.active.add(request)
        return [request for request in living if request.strikes >= FATAL]


def _requests(worker: Worker, flight: InFlight) -> list[Request]:
    """The requests with a row in a plan, oldest first."""
    s = worker.slots
    found = set()
    for slot, generation in zip(flight.row_slots.tolist(), flight.row_generations.tolist(), strict=True):
        choice = s.choice[slot]
        if choice is not None and s.generation[slot] == generation:
            found.add(choice.request)
    return sorted(found, key=lambda request: request.number)
