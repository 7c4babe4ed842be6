"""Makes one plan for one worker: who runs in the next step, in which blocks.

A plan never depends on a sampled value: it is made from counts alone, while earlier steps still run. The order:

    1. decodes, one token each; then the next chunk of every prefill, oldest first; all under one token budget
    2. if blocks run out, the newest of the lowest priority is preempted, and nobody is admitted in this step
    3. waiting choices, in order, into free slots, as far as budget and predicted blocks allow

A steady decode step touches whole columns only; Python visits the rows where something happens.
"""

from __future__ import annotations

import numpy as np

from protocol.counters import Counters
from protocol.messages import Plan
from scheduler_svc.admission import fits
from scheduler_svc.draft import Draft, assemble
from scheduler_svc.frontends import Allowance, Frontends
from scheduler_svc.hits import found
from scheduler_svc.requests import Choice, State
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.slots import DECODE, PLANNED, Index
from scheduler_svc.steps import Copy, DecodeRows
from scheduler_svc.tables import bind, bring_back, extend, grow, publish, share
from scheduler_svc.victims import Victims
from scheduler_svc.worker import Worker

ADMITTED = 32  # choices that one step admits: with a prefix of 2,048 tokens one takes 55 µs to plan, and the device waits for the plan
HOST_HITS = 4096  # blocks that one step brings back from the host: all streams wait for the copies


class Planner:
    """The plan under construction; `make` is all there is to call."""

    def __init__(self, worker: Worker, frontends: Frontends, counters: Counters, settings: SchedulerSettings, trial: int) -> None:
        self.worker = worker
        self.frontends = frontends
        self.counters = counters
        self.settings = settings
        self.chunk_limit = settings.long_prefill_token_threshold or worker.budget
        self.trial = trial  # suspects that run alone in this step (suspects.py); 0: everyone but suspects
        self.budget = worker.budget
        self.draft = Draft()
        self.now = 0.0
        self.allowance = Allowance(frontends)
        self.victims = Victims(worker, self.draft, self.allowance, counters, trial)

    def make(self, now: float) -> Plan | None:
        """Make the plan and enter it among those in flight. None if there is nothing to do."""
        worker, self.now = self.worker, now
        self.draft.copies, worker.copies = worker.copies, []
        if worker.queue and not worker.slots.free:
            self.victims.claim(worker.queue.first(self._passed_over, self.trial))
        self._decodes()
        self._prefills()
        if not self.victims.preempted and worker.queue:
            self._admissions()
        news = self.victims.swapping or ((worker.has_news or self.draft.copies) and not worker.in_flight)
        if not (self.draft.rows or self.draft.decodes or news):
            worker.copies = self.draft.copies
            return None
        if self.draft.rows or self.draft.decodes:
            worker.model.tally.steps.observe(worker.budget - self.budget)
        return assemble(worker, self.draft, self.frontends, now)

    # ------------------------------------------------------------ running sequences

    def _decodes(self) -> None:
        """Plan one token for every decoding slot that has credit, budget and blocks."""
        worker, s = self.worker, self.worker.slots
        if self.trial:
            return
        while True:
            if worker.decoding is None:
                worker.decoding = worker.rows_of((s.state == DECODE).nonzero()[0])
            rows = worker.decoding
            if not len(rows.slots):
                return
            slots = self._with_credit(rows)
            if len(slots) > self.budget:
                turn = worker.turn = (worker.turn + self.budget) % len(slots)
                slots = np.roll(slots, -turn)[: self.budget]
            if not len(slots):
                return
            if slots is not rows.slots:
                rows = worker.rows_of(slots)
            full_up = (rows.mask & (s.computed >= s.capacity)).nonzero()[0]
            if len(full_up) <= worker.blocks.available:
                break
            if self.victims.suffice(len(full_up)) or not self.victims.take(None):
                # only the oldest is left, or what is about to end or to leave holds the blocks: these rows wait
                left_out = full_up[np.argsort(self._ages(full_up), kind="stable")][worker.blocks.available :]
                rows = worker.rows_of(np.setdiff1d(rows.slots, left_out))
                full_up = np.setdiff1d(full_up, left_out)
                break
        if not len(rows.slots):
            return
        if len(full_up):
            grow(worker, self.draft, full_up)
        self.draft.decodes = rows
        self.draft.starts = s.computed[rows.slots]
        self.budget -= len(rows.slots)
        s.length += rows.one
        s.computed += rows.one
        for index, n in rows.credit:
            self.allowance.use(index, n)
        if worker.caching:
            full = (rows.mask & (s.computed == s.capacity)).nonzero()[0]
            self.draft.filled = (full, s.generation[full], s.blocks[full] - 1)
        last = (rows.mask & (s.length >= s.limit)).nonzero()[0]
        if len(last):
            s.state[last] = PLANNED
            worker.decoding = None

    def _with_credit(self, rows: DecodeRows) -> Index:
        """The slots whose frontends can take another token; of a frontend that cannot take all, the oldest ones."""
        slots = rows.slots
        for index, n in rows.credit:
            free = max(self.allowance.free(index), 0)
            if n > free:
                theirs = np.flatnonzero(self.worker.slots.frontend[slots] == index)
                newest = np.argsort(self._ages(slots[theirs]), kind="stable")[free:]
                slots = np.delete(slots, theirs[newest])
                self.counters.add("scheduler_rows_without_credit", n - free)
        return slots

    def _ages(self, slots: Index) -> Index:
        """Rank of each slot among these, oldest first."""
        choices = self.worker.slots.choice
        keys = [choice.key for choice in (choices[slot] for slot in slots.tolist()) if choice is not None]
        ranks = np.empty(len(keys), dtype=np.intp)
        ranks[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
        return ranks

    def _prefills(self) -> None:
        """The next chunk of every prefill that is under way, oldest first."""
        worker = self.worker
        if not worker.prefilling:
            return
        under_way = [choice for choice in (worker.slots.choice[slot] for slot in worker.prefilling) if choice is not None]
        for choice in sorted(under_way, key=lambda choice: choice.key):
            if self.budget <= 0:
                break
            if choice.slot in worker.prefilling and choice.request.trial == self.trial:
                self._chunk(choice.slot)  # if it was not preempted for an older one meanwhile

    def _chunk(self, slot: int) -> bool:
        """Plan the slot's next chunk, as much of it as budget and blocks allow. False if that is nothing."""
        worker, s, size = self.worker, self.worker.slots, self.worker.block_size
        choice = s.choice[slot]
        assert choice is not None
        start, length = int(s.computed[slot]), int(s.length[slot])
        count = min(length - start, self.budget, self.chunk_limit)
        ends = start + count == length
        outputs = 0 if choice.scores else 1 + len(choice.forks)
        if (ends or choice.scores) and self.allowance.free(choice.request.frontend.index) <= 0:
            return False
        need = -(-(start + count) // size) - int(s.blocks[slot])
        while need > worker.blocks.available:
            if self.victims.suffice(need) or not self.victims.take(choice):
                count = min(count, int(s.capacity[slot]) + worker.blocks.available * size - start)
                need = worker.blocks.available
                ends = False
                if count <= 0:
                    return False
                break
        if need > 0:
            extend(worker, self.draft, slot, worker.blocks.take(need))
        end = start + count
        self.budget -= count
        s.computed[slot] = end
        publish(worker, self.draft, slot, start // size, end // size)
        row = len(self.draft.rows)
        first = max(start + 1, choice.request.scored) if choice.scores else 0
        self.draft.rows.append((slot, start, count, int(ends and not choice.scores), first if first <= end else 0))
        if ends:
            self.allowance.use(choice.request.frontend.index, outputs)
            self._prefilled(slot, length + (not choice.scores))
            if choice.forks:
                self._fork(choice, row, end)
        return True

    def _prefilled(self, slot: int, length: int) -> None:
        """The slot's prefill ends in this plan, and with it come `length` tokens: from the next one on it decodes."""
        s = self.worker.slots
        s.length[slot] = length
        s.state[slot] = PLANNED if length >= s.limit[slot] else DECODE
        self.worker.prefilling.discard(slot)
        self.worker.decoding = None

    def _fork(self, parent: Choice, row: int, length: int) -> None:
        """The parent's prefill ends here: sample its siblings' first tokens from the same row.

        A child shares the full blocks and gets a copy of the partly filled one at the head of the next plan. Those
        that find no slot, no block or no room in the plan wait in the queue and will find the prefix by its hash.
        """
        worker, s, blocks, size = self.worker, self.worker.slots, self.worker.blocks, self.worker.block_size
        full, partial = divmod(length, size)
        children, parent.forks = parent.forks, []
        for child in children:
            if not s.free or (partial and not blocks.available) or child.request.ended or self.draft.is_full:
                worker.queue.add(child)
                continue
            shared = s.table[parent.slot, :full]
            slot = bind(worker, self.draft, child)
            worker.queue.charge(child, min(child.limit - length, worker.model.outputs.expected))
            s.names[slot] = s.names[parent.slot][:full]
            share(worker, self.draft, slot, shared)
            child.shared_blocks = full + bool(partial)
            if partial:
                source = int(s.table[parent.slot, full])
                blocks.share([source])
                (target,) = blocks.take(1)
                extend(worker, self.draft, slot, [target])
                worker.copies.append(Copy(source, target, slot, int(s.generation[slot])))
            s.computed[slot] = length
            self._prefilled(slot, length + 1)
            self.draft.forks.append((row, slot))

    # ------------------------------------------------------------ admission

    def _admissions(self) -> None:
        """Waiting choices in order, until one does not fit."""
        worker = self.worker
        partial = self.settings.max_num_partial_prefills or worker.slots.count
        for _ in range(ADMITTED):
            if self.budget <= 0 or len(worker.prefilling) >= partial or len(self.draft.returns) >= HOST_HITS or self.draft.is_full:
                return
            choice = worker.queue.first(self._passed_over, self.trial)
            if choice is None or (choice.swap is not None and not choice.swap.copied):
                return
            if not worker.slots.free or (worker.is_full and worker.stuck is not None and worker.stuck[0] is choice):
                fits = False
            else:
                fits = self._admit(choice)
                worker.stuck = None if fits else (choice, worker.blocks.available)
            if not fits:
                self.victims.claim(choice)
                return

    def _passed_over(self, index: int) -> bool:
        """Whether nobody of this frontend is admitted: it is out of credit."""
        return self.allowance.free(index) <= 0

    def _admit(self, choice: Choice) -> bool:
        """Bind the choice, with the blocks of its longest cached prefix, and plan its first chunk."""
        worker, s, size = self.worker, self.worker.slots, self.worker.block_size
        request, length = choice.request, choice.length
        hits, host_hits = found(worker, choice)
        host_hits = host_hits[: HOST_HITS - len(self.draft.returns)]
        idle_hits = sum(not worker.blocks.refs[block] for block in hits)
        if not fits(worker, choice, -(-length // size) - len(hits) + idle_hits):
            return False
        cached = (len(hits) + len(host_hits)) * size
        worker.queue.charge(choice, length - cached + min(choice.limit - length, worker.model.outputs.expected))
        worker.queue.remove(choice)
        if not choice.scores and not len(choice.tokens):
            for sibling in request.choices:
                if sibling.queue is worker.queue and not len(sibling.tokens):
                    worker.queue.remove(sibling)
                    sibling.state = State.FORKING
                    choice.forks.append(sibling)
        slot = bind(worker, self.draft, choice)
        s.names[slot] = list(choice.chains[size].names) if worker.caching else []
        share(worker, self.draft, slot, np.array(hits, dtype=np.int32))
        s.computed[slot] = len(hits) * size
        if choice.swap is not None:
            self._swap_in(choice, len(hits))
        else:
            choice.shared_blocks = len(hits) + len(host_hits)
        if host_hits:
            self.counters.add("scheduler_host_hits", len(host_hits) * size)
            worker.host.read(host_hits, worker.step + 1)
            bring_back(worker, self.draft, slot, host_hits, cached)
        self.counters.add("scheduler_prefix_queries", length)
        self.counters.add("scheduler_prefix_hits", cached)
        worker.model.tally.queries += length
        worker.model.tally.hits += cached
        if request.cached < 0:
            request.cached, request.queued = cached, self.now - request.arrival
            request.frontend.admitted.append((request.handle, request.cached, request.queued))
            if request.submit.trace:
                worker.model.tally.traced.append((request.submit.trace, request.arrival, self.now))
        request.admitted = True
        self._chunk(slot)
        return True

    def _swap_in(self, choice: Choice, hits: int) -> None:
        """Bring the choice's own blocks back, behind those that it has found on the device."""
        worker = self.worker
        assert choice.swap is not None
        self.counters.add("scheduler_swaps_in")
        choice.shared_blocks = max(choice.shared_blocks, hits)
        computed = choice.swap.computed
        if host := worker.host.swap_in(choice, hits, worker.step + 1):
            bring_back(worker, self.draft, choice.slot, host, computed)
