"""Who gives up blocks or a slot in a plan, and for whom."""

from __future__ import annotations

import numpy as np

from protocol.counters import Counters
from scheduler_svc.draft import Draft
from scheduler_svc.frontends import Allowance
from scheduler_svc.preemption import preempt, swaps
from scheduler_svc.requests import Choice
from scheduler_svc.slots import DECODE, PREFILL
from scheduler_svc.worker import Worker


class Victims:
    """Preemption within one plan."""

    __slots__ = ("_allowance", "_counters", "_draft", "_trial", "_worker", "preempted", "swapping")

    def __init__(self, worker: Worker, draft: Draft, allowance: Allowance, counters: Counters, trial: int) -> None:
        self.preempted = False  # or somebody waits for blocks that preempted ones are about to give up
        self.swapping = False  # blocks can leave in this plan; somebody waits for them
        self._worker = worker
        self._draft = draft
        self._allowance = allowance
        self._counters = counters
        self._trial = trial

    def suffice(self, blocks: int) -> bool:
        """Whether so many blocks will be there once the copies to the host are made: nobody else need be preempted."""
        worker = self._worker
        enough = bool(worker.host.leaving) and blocks <= worker.blocks.available + worker.host.coming
        self.preempted |= enough
        return enough

    def take(self, claimant: Choice | None) -> bool:
        """Take the blocks of the newest of the lowest priority, before whom the claimant (None: anyone older) comes.

        The oldest choice whose frontend has credit is never a victim, so that something always moves. False if there
        is no victim.
        """
        s = self._worker.slots
        held = np.flatnonzero((s.state == PREFILL) | (s.state == DECODE)).tolist()
        choices = [c for c in (s.choice[slot] for slot in held) if c is not None]
        oldest = min((c.key for c in choices if not self._owes(c)), default=None)
        # those planned already keep their blocks for this step, unless nothing more is planned after the claim
        rows = {row[0] for row in self._draft.rows}.union(self._draft.decodes.slots.tolist() if self._draft.decodes else ())
        planned = {copy.slot for copy in self._draft.copies}
        if claimant is None or claimant.slot >= 0:
            planned |= rows
        victims = [c for c in choices if c.key != oldest and c.slot not in planned and s.blocks[c.slot] and self._yields(c, claimant)]
        if not victims:
            return False
        self.preempted = True
        self._counters.add("scheduler_preemptions")
        self._worker.model.tally.preemptions += 1
        victim = max(victims, key=lambda c: (self._owes(c), c.key))
        swap_at = 0
        if swaps(self._worker, victim):
            self._counters.add("scheduler_swaps_out")
            swap_at = self._worker.step + (2 if victim.slot in rows else 1)
            self.swapping = True
        preempt(self._worker, victim, swap_at)
        return True

    def claim(self, choice: Choice | None) -> None:
        """Push somebody out for a waiting choice that has no room, unless one is on its way out already."""
        if choice is not None and not self._worker.draining and not self._worker.host.leaving and self._may_claim(choice):
            self.take(choice)

    def _may_claim(self, choice: Choice) -> bool:
        """Whether somebody runs whom this waiting choice may push out: a quick look before the search."""
        s = self._worker.slots
        if self._trial or self._allowance.used_up:
            return True
        return bool((s.priority > choice.key[0]).any())

    def _owes(self, choice: Choice) -> bool:
        """Whether the choice's frontend is out of credit."""
        return self._allowance.free(choice.request.frontend.index) <= 0

    def _yields(self, victim: Choice, claimant: Choice | None) -> bool:
        """Whether the claimant may take the victim's blocks. One that waits may do so only by priority, not by age."""
        if claimant is None or self._owes(victim):
            return True
        if self._trial:
            return victim.request.trial != self._trial
        if claimant.slot >= 0:
            return claimant.key < victim.key
        return claimant.key[0] < victim.key[0]
