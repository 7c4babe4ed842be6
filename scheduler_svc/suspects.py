"""Finding the request that breaks steps, without harming its neighbours.

When a worker's session ends with plans unacknowledged, the oldest of them is held responsible: its requests are
suspects. They come back in groups, each in steps of its own with nothing else in flight on that worker, divided again
at each failure, and are cleared by a token that becomes known. Those which failed least recently come first, so that
the innocent ones of a failed group are cleared before its guilty one breaks another step.

A request whose group has failed is quarantined, and so is one that was prefilled in a step that hung: all such go to
one worker, one that has just come back if there are several, and nobody else is sent there meanwhile. The fleet serves
the others (`routing.py`, `Arrivals.leave`).

Failures of a plan that held one request alone are counted: a lost session is one, a HELLO that names the step makes
it two; four in a row end the request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from protocol.messages import Hello
from scheduler_svc.frontends import Frontends
from scheduler_svc.requests import Request
from scheduler_svc.steps import InFlight
from scheduler_svc.worker import Worker

FATAL = 4
PARTS = 8  # groups that a failed one is divided into: a failure costs seconds, a group more a step


class Rows(NamedTuple):
    """The requests of a plan, oldest first: those that only went on decoding, and those that computed something new."""

    decoding: list[Request]
    prefilling: list[Request]

    @property
    def living(self) -> list[Request]:
        """All that have not ended."""
        return [request for request in (*self.decoding, *self.prefilling) if not request.ended]

    def groups(self) -> list[list[Request]]:
        """The living ones, those first who are least likely to be guilty: what has been decoded before harms nobody, mostly."""
        decoding, prefilling = ([request for request in rows if not request.ended] for rows in self)
        return [decoding, *_parts(prefilling)] if decoding and prefilling else _parts(decoding + prefilling)


@dataclass(slots=True)
class Loss:
    """A lost session, until its incarnation says HELLO again or is replaced."""

    session: int
    hung: bool
    oldest: int  # step
    plans: dict[int, Rows]  # that were in flight, by step


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
        plans = {flight.step: _rows(worker, flight) for flight in worker.in_flight}
        oldest = worker.in_flight[0].step
        for request in plans[oldest].living:
            request.quarantined = request.trial > 0 or (hung and request in plans[oldest].prefilling)
        self._losses[worker.incarnation] = Loss(worker.session, hung, oldest, plans)
        while len(self._losses) > 64:
            del self._losses[next(iter(self._losses))]
        return self._strike(plans[oldest], 1)

    def returned(self, hello: Hello) -> list[Request]:
        """A worker says HELLO: judge what its last session's end meant. Returns those that have failed too often."""
        loss = self._losses.pop(hello.incarnation, None)
        if loss is None:
            return []
        named = hello.failed_session == loss.session and hello.failed_step in loss.plans
        if not named and loss.hung:
            return []
        if named and hello.failed_step == loss.oldest:
            return self._strike(loss.plans[loss.oldest], 1)
        blamed = loss.plans[loss.oldest].living
        alone = len(blamed) == 1
        for request in blamed:  # the process lives, so that step broke nothing
            request.strikes -= alone and request.strikes > 0
            if not request.strikes:
                self.clear(request)
        return self._strike(loss.plans[hello.failed_step], 2) if named else []

    def clear(self, request: Request) -> None:
        """A token of the request has become known."""
        request.strikes = request.trial = 0
        request.quarantined = False
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
        return min((request.trial for request in here), default=0)

    def _strike(self, rows: Rows, strikes: int) -> list[Request]:
        living = rows.living
        for group in rows.groups():
            self._groups += 1
            for request in group:
                if len(living) == 1:  # in company, the fault may be another's
                    request.strikes += strikes
                request.trial = self._groups
                self.active.add(request)
        return [request for request in living if request.strikes >= FATAL]


def _parts(requests: list[Request]) -> list[list[Request]]:
    size = -(-len(requests) // PARTS)
    return [requests[i : i + size] for i in range(0, len(requests), size or 1)]


def _rows(worker: Worker, flight: InFlight) -> Rows:
    """Whose rows a plan holds."""
    s = worker.slots
    found: tuple[set[Request], set[Request]] = set(), set()
    for row, (slot, generation) in enumerate(zip(flight.row_slots.tolist(), flight.row_generations.tolist(), strict=True)):
        choice = s.choice[slot]
        if choice is not None and s.generation[slot] == generation:
            found[row >= flight.decodes].add(choice.request)
    decoding, prefilling = (sorted(requests, key=lambda request: request.number) for requests in (found[0] - found[1], found[1]))
    return Rows(decoding, prefilling)
