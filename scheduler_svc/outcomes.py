"""What a worker's results do to requests: tokens are told, choices end, and what held a NaN is never hit again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from protocol.columns import unpack_floats
from protocol.counters import Counters
from protocol.messages import PromptScores, Result, Scored
from scheduler_svc.frontends import Frontends
from scheduler_svc.ledger import Ledger
from scheduler_svc.preemption import detach_forks
from scheduler_svc.requests import Choice, State
from scheduler_svc.results import BadResult, scorer_of, take
from scheduler_svc.suspects import Suspects
from scheduler_svc.worker import Worker


class Outcomes:
    """Takes results and scores; a worker that answers what was not asked is fenced, `fence(worker, reason)`."""

    def __init__(
        self, ledger: Ledger, frontends: Frontends, suspects: Suspects, counters: Counters, fence: Callable[[Worker, str], None]
    ) -> None:
        self._ledger = ledger
        self._frontends = frontends
        self._suspects = suspects
        self._counters = counters
        self._fence = fence

    def result(self, worker: Worker, message: Result, now: float) -> bool:
        """Take the result of a step. Whether the worker's depth has changed with it."""
        if not worker.in_flight:
            self._fence(worker, f"it answers step {message.step}, which was not planned")
            return False
        flight = worker.in_flight[0]
        try:
            taken = take(worker, message, self._frontends)
        except BadResult as bad:
            self._fence(worker, str(bad))
            return False
        if worker.host.busy:
            worker.host.acknowledged(message.copied)
        changed = worker.took(flight, message.seconds, message.idle, now)
        for frontend, tokens, weight in taken.tokens:
            self._ledger.out.append((frontend.session, tokens, weight))
        if taken.ownerless:
            self._counters.add("scheduler_rows_ownerless", taken.ownerless)
        if self._suspects.active:
            for choice in [worker.slots.choice[slot] for slot in taken.slots.tolist()]:
                if choice is not None:
                    self._suspects.clear(choice.request)
        for choice in taken.ended:
            worker.model.outputs.add(len(choice.known))
            self._ledger.stop(choice)
            self._ledger.settle(choice.request, now)
        for choice in taken.nan:
            self._nan(worker, choice, now)
        for choice in taken.drained:
            if choice.state is not State.ENDED:  # with its request, by a sibling's NaN
                worker.queue.add(choice)
        return changed

    def scored(self, worker: Worker, message: Scored, now: float) -> None:
        """Log probabilities of a prompt are told in the order of their positions, each once, and not kept."""
        try:
            scorer = scorer_of(worker, message)
        except BadResult as bad:
            self._fence(worker, str(bad))
            return
        if scorer is None:
            self._counters.add("scheduler_rows_ownerless")
            return
        request, scores = scorer.request, message.scores
        if np.isnan(unpack_floats(scores.values)).any():
            self._nan(worker, scorer, now)
        elif scores.first == request.scored:
            request.scored += scores.count
            self._suspects.clear(request)
            if request.frontend.admitted:
                self._ledger.send(request.frontend, request.frontend.tokens())  # of a prompt that is only scored none come
            self._ledger.send(request.frontend, PromptScores(request.handle, scores), scores.count)
            if not request.unscored:
                self._ledger.stop(scorer)
                self._ledger.settle(request, now)

    def _nan(self, worker: Worker, choice: Choice, now: float) -> None:
        """A row's logits held a NaN: nothing it has touched may be hit again."""
        if choice.slot < 0:
            return  # its request has just failed
        self._counters.add("scheduler_nan_rows")
        s, slot = worker.slots, choice.slot
        held = s.table[slot, : s.blocks[slot]].tolist() + (choice.swap.blocks if choice.swap is not None else [])
        for block in held:
            worker.blocks.forget(block)
        worker.withdrawals += held  # a block that has come from the host may be known there by its name, and not here yet
        worker.host.withdraw(s.names[slot][: len(held)])
        worker.host.void(choice)
        if choice.no_hits or not choice.shared_blocks:
            self._ledger.fail(choice.request, now, 500, "nan", "The model's output for this request is not a number.")
            return
        choice.no_hits = True  # the fault may have come with a shared block
        detach_forks(worker, choice)
        worker.unbind(slot)
        worker.queue.add(choice)
