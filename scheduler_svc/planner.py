"""Makes one plan for one worker: who runs in the next step, in which blocks.

A plan never depends on a sampled value: it is made from counts alone, while earlier steps still run. The order:

    1. decodes, one token each; then the next chunk of every prefill, oldest first; all under one token budget
    2. if blocks run out, the newest of the lowest priority is preempted, and nobody is admitted in this step
    3. waiting choices, in order, into free slots, as far as budget and predicted blocks allow

A steady decode step touches whole columns only; Python visits the rows where something happens.
"""

from __future__ import annotations

import numpy as np

from protocol.columns import Int32, pack
from protocol.counters import Counters
from protocol.messages import Admit, Plan
from scheduler_svc.admission import fits
from scheduler_svc.draft import Draft, Entries, assemble
from scheduler_svc.frontends import Frontends
from scheduler_svc.preemption import preempt, swaps
from scheduler_svc.requests import Choice, State
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.worker import DECODE, PLANNED, PREFILL, Copy, DecodeRows, Index, Worker


class Planner:
    """The plan under construction; `make` is all there is to call."""

    def __init__(self, worker: Worker, frontends: Frontends, counters: Counters, settings: SchedulerSettings, trial: int) -> None:
        self.worker = worker
        self.frontends = frontends
        self.counters = counters
        self.settings = settings
        self.chunk_limit = settings.long_prefill_token_threshold or worker.budget
        self.caching = worker.caching
        self.trial = trial  # suspects that run alone in this step (suspects.py); 0: everyone but suspects
        self.budget = worker.budget
        self.preempted = False  # or somebody waits for blocks that preempted ones are about to give up
        self.swapping = False  # blocks can leave in this plan; somebody waits for them
        self.draft = Draft()
        self.now = 0.0
        self.credit: dict[int, int] = {}  # free tokens per frontend index, as this plan uses them up

    def make(self, now: float) -> Plan | None:
        """Make the plan and enter it among those in flight. None if there is nothing to do."""
        worker, self.now = self.worker, now
        self.draft.copies, worker.copies = worker.copies, []
        if worker.queue and not worker.slots.free:
            self._claim(worker.queue.first(self._passed_over, self.trial))
        self._decodes()
        self._prefills()
        if not self.preempted and worker.queue:
            self._admissions()
        news = self.swapping or ((worker.has_news or self.draft.copies) and not worker.in_flight)
        if not (self.draft.rows or self.draft.decodes or news):
            worker.copies = self.draft.copies
            return None
        worker.model.tally.steps.observe(worker.budget - self.budget)
        return assemble(worker, self.draft, self.frontends, now)

    # ------------------------------------------------------------ 1. running sequences

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
            grow = (rows.mask & (s.computed >= s.capacity)).nonzero()[0]
            if len(grow) <= worker.blocks.available:
                break
            if self._suffices(len(grow)) or not self._preempt(None):
                # only the oldest is left, or what is about to end or to leave holds the blocks: these rows wait
                left_out = grow[np.argsort(self._ages(grow), kind="stable")][worker.blocks.available :]
                rows = worker.rows_of(np.setdiff1d(rows.slots, left_out))
                grow = np.setdiff1d(grow, left_out)
                break
        if not len(rows.slots):
            return
        if len(grow):
            self._grow(grow)
        self.draft.decodes = rows
        self.draft.starts = s.computed[rows.slots]
        self.budget -= len(rows.slots)
        s.length += rows.one
        s.computed += rows.one
        for index, n in rows.credit:
            self.credit[index] = self._credit(index) - n
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
            free = max(self._credit(index), 0)
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

    def _credit(self, index: int) -> int:
        if index not in self.credit:
            self.credit[index] = self.frontends.free(self.frontends.at(index))
        return self.credit[index]

    def _grow(self, slots: Index) -> None:
        """One more block for each of these slots."""
        s = self.worker.slots
        taken = np.array(self.worker.blocks.take(len(slots)), dtype=np.int32)
        indices = s.blocks[slots]
        s.table[slots, indices] = taken
        s.blocks[slots] = indices + 1
        s.capacity[slots] += self.worker.block_size
        self.draft.assign.append((slots, indices, taken))

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
        if (ends or choice.scores) and self._credit(choice.request.frontend.index) <= 0:
            return False
        need = -(-(start + count) // size) - int(s.blocks[slot])
        while need > worker.blocks.available:
            if self._suffices(need) or not self._preempt(choice):
                count = min(count, int(s.capacity[slot]) + worker.blocks.available * size - start)
                need = worker.blocks.available
                ends = False
                if count <= 0:
                    return False
                break
        if need > 0:
            self._extend(slot, worker.blocks.take(need))
        end = start + count
        self.budget -= count
        s.computed[slot] = end
        if self.caching:
            self._publish(slot, start // size, end // size)
        row = len(self.draft.rows)
        first = max(start + 1, choice.request.scored) if choice.scores else 0
        self.draft.rows.append((slot, start, count, int(ends and not choice.scores), first if first <= end else 0))
        if ends:
            self.credit[choice.request.frontend.index] -= outputs
            self._prefilled(slot, length + (not choice.scores))
            if choice.forks:
                self._fork(choice, row, end)
        return True

    def _extend(self, slot: int, blocks: list[int]) -> None:
        """Blocks to be written, at the end of the slot's table."""
        s = self.worker.slots
        first = int(s.blocks[slot])
        last = first + len(blocks)
        entries = np.array(blocks, dtype=np.int32)
        s.table[slot, first:last] = entries
        s.blocks[slot] = last
        s.capacity[slot] = last * self.worker.block_size
        self.draft.assign.append(_entries(slot, first, entries))

    def _publish(self, slot: int, first: int, last: int) -> None:
        """Blocks first … last − 1 of the slot are full with this plan: later rows may share them from here on."""
        s, blocks = self.worker.slots, self.worker.blocks
        if last <= first:
            return
        self.draft.pending += blocks.publish(s.table[slot, first:last].tolist(), s.names[slot][first:last])

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
        that find no slot or no block wait in the queue and will find the prefix by its hash.
        """
        worker, s, blocks, size = self.worker, self.worker.slots, self.worker.blocks, self.worker.block_size
        full, partial = divmod(length, size)
        children, parent.forks = parent.forks, []
        for child in children:
            if not s.free or (partial and not blocks.available) or child.request.ended:
                worker.queue.add(child)
                continue
            shared = s.table[parent.slot, :full]
            slot = self._bind(child)
            worker.queue.charge(child, min(child.limit - length, worker.model.outputs.expected))
            s.names[slot] = s.names[parent.slot][:full]
            self._share(slot, shared)
            child.shared_blocks = full + bool(partial)
            if partial:
                source = int(s.table[parent.slot, full])
                blocks.share([source])
                (target,) = blocks.take(1)
                self._extend(slot, [target])
                self.worker.copies.append(Copy(source, target, slot, int(s.generation[slot])))
            s.computed[slot] = length
            self._prefilled(slot, length + 1)
            self.draft.forks.append((row, slot))

    def _share(self, slot: int, blocks: Int32) -> None:
        """Blocks to be read only, at the head of the slot's empty table."""
        s = self.worker.slots
        n = len(blocks)
        if n:
            self.worker.blocks.share(blocks.tolist())
            s.table[slot, :n] = blocks
            s.blocks[slot] = n
            s.capacity[slot] = n * self.worker.block_size
            self.draft.share.append(_entries(slot, 0, blocks))

    def _bind(self, choice: Choice) -> int:
        """A slot for a choice, a record for it if its worker has none."""
        worker, request = self.worker, choice.request
        slot = worker.bind(choice, choice.all_tokens)
        if not choice.cached_record:
            worker.records += 1
            choice.cached_record = worker.records
            told = request.submit
            self.draft.admits.append(Admit(worker.records, told.prompt, pack(choice.tokens), choice.seed, told.params, told.trace))
        self.draft.binds.append((slot, int(worker.slots.generation[slot]), choice.cached_record))
        return slot

    # ------------------------------------------------------------ 2. preemption

    def _suffices(self, blocks: int) -> bool:
        """Whether so many blocks will be there once the copies to the host are made: nobody else need be preempted."""
        worker = self.worker
        enough = bool(worker.host.leaving) and blocks <= worker.blocks.available + worker.host.coming
        self.preempted |= enough
        return enough

    def _preempt(self, claimant: Choice | None) -> bool:
        """Take the blocks of the newest of the lowest priority, before whom the claimant (None: anyone older) comes.

        The oldest choice whose frontend has credit is never a victim, so that something always moves. False if there
        is no victim.
        """
        s = self.worker.slots
        held = np.flatnonzero((s.state == PREFILL) | (s.state == DECODE)).tolist()
        choices = [c for c in (s.choice[slot] for slot in held) if c is not None]
        oldest = min((c.key for c in choices if not self._owes(c)), default=None)
        # those planned already keep their blocks for this step, unless nothing more is planned after the claim
        rows = {row[0] for row in self.draft.rows}.union(self.draft.decodes.slots.tolist() if self.draft.decodes else ())
        planned = {copy.slot for copy in self.draft.copies}
        if claimant is None or claimant.slot >= 0:
            planned |= rows
        victims = [c for c in choices if c.key != oldest and c.slot not in planned and s.blocks[c.slot] and self._yields(c, claimant)]
        if not victims:
            return False
        self.preempted = True
        self.counters.add("scheduler_preemptions")
        self.worker.model.tally.preemptions += 1
        victim = max(victims, key=lambda c: (self._owes(c), c.key))
        swap_at = 0
        if swaps(self.worker, victim, self.settings.preemption):
            self.counters.add("scheduler_swaps_out")
            swap_at = self.worker.step + (2 if victim.slot in rows else 1)
            self.swapping = True
        preempt(self.worker, victim, swap_at)
        return True

    def _owes(self, choice: Choice) -> bool:
        """Whether the choice's frontend is out of credit."""
        return self._credit(choice.request.frontend.index) <= 0

    def _yields(self, victim: Choice, claimant: Choice | None) -> bool:
        """Whether the claimant may take the victim's blocks. One that waits may do so only by priority, not by age."""
        if claimant is None or self._owes(victim):
            return True
        if self.trial:
            return victim.request.trial != self.trial
        if claimant.slot >= 0:
            return claimant.key < victim.key
        return claimant.key[0] < victim.key[0]

    # ------------------------------------------------------------ 3. admission

    def _admissions(self) -> None:
        """Waiting choices in order, until one does not fit."""
        worker = self.worker
        partial = self.settings.max_num_partial_prefills or worker.slots.count
        while self.budget > 0 and len(worker.prefilling) < partial:
            choice = worker.queue.first(self._passed_over, self.trial)
            if choice is None or (choice.swap is not None and not choice.swap.copied):
                return
            stuck = worker.stuck
            if not worker.slots.free or (
                stuck is not None and stuck[0] is choice and worker.blocks.available <= stuck[1] and worker.running
            ):
                fits = False
            else:
                fits = self._admit(choice)
                worker.stuck = None if fits else (choice, worker.blocks.available)
            if not fits:
                self._claim(choice)
                return

    def _passed_over(self, index: int) -> bool:
        """Whether nobody of this frontend is admitted: it is out of credit."""
        return self._credit(index) <= 0

    def _claim(self, choice: Choice | None) -> None:
        """Push somebody out for a waiting choice that has no room, unless one is on its way out already."""
        if choice is not None and not self.worker.draining and not self.worker.host.leaving and self._may_claim(choice):
            self._preempt(choice)

    def _may_claim(self, choice: Choice) -> bool:
        """Whether somebody runs whom this waiting choice may push out: a quick look before the search."""
        s = self.worker.slots
        if self.trial or any(free <= 0 for free in self.credit.values()):
            return True
        return bool((s.priority > choice.key[0]).any())

    def _admit(self, choice: Choice) -> bool:
        """Bind the choice, with the blocks of its longest cached prefix, and plan its first chunk."""
        worker, s, blocks, size = self.worker, self.worker.slots, self.worker.blocks, self.worker.block_size
        request, length = choice.request, choice.length
        names = choice.chains[size].names if self.caching else []
        hits = [] if choice.no_hits else blocks.match(names, choice.most_cached // size)
        idle_hits = sum(not blocks.refs[block] for block in hits)
        if not fits(worker, choice, -(-length // size) - len(hits) + idle_hits):
            return False
        worker.queue.charge(choice, length - len(hits) * size + min(choice.limit - length, worker.model.outputs.expected))
        worker.queue.remove(choice)
        if not choice.scores and not len(choice.tokens):
            for sibling in request.choices:
                if sibling.queue is worker.queue and not len(sibling.tokens):
                    worker.queue.remove(sibling)
                    sibling.state = State.FORKING
                    choice.forks.append(sibling)
        slot = self._bind(choice)
        s.names[slot] = list(names)
        self._share(slot, np.array(hits, dtype=np.int32))
        s.computed[slot] = len(hits) * size
        if choice.swap is not None:
            self._return(slot, choice.swap.computed, len(hits))
        else:
            choice.shared_blocks = len(hits)
        self.counters.add("scheduler_prefix_queries", length)
        self.counters.add("scheduler_prefix_hits", len(hits) * size)
        worker.model.tally.queries += length
        worker.model.tally.hits += len(hits) * size
        if request.cached < 0:
            request.cached, request.queued = len(hits) * size, self.now - request.arrival
            request.frontend.admitted.append((request.handle, request.cached, request.queued))
            if request.submit.trace:
                worker.model.tally.traced.append((request.submit.trace, request.arrival, self.now))
        request.admitted = True
        self._chunk(slot)
        return True

    def _return(self, slot: int, computed: int, hits: int) -> None:
        """Copy what the slot's choice has in host memory back, behind the `hits` blocks it has found on the device."""
        worker, s, size = self.worker, self.worker.slots, self.worker.block_size
        choice = s.choice[slot]
        assert choice is not None
        self.counters.add("scheduler_swaps_in")
        host = worker.host.swap_in(choice, hits, worker.step + 1)
        choice.shared_blocks = max(choice.shared_blocks, hits)
        if host:
            blocks = worker.blocks.take(len(host))
            self._extend(slot, blocks)
            self.draft.returns += zip(host, blocks, strict=True)
            s.computed[slot] = computed
            if self.caching:
                self._publish(slot, hits, computed // size)


def _entries(slot: int, first: int, blocks: Int32) -> Entries:
    """Entries of one slot's table from index `first` on."""
    return np.full(len(blocks), slot), np.arange(first, first + len(blocks), dtype=np.int32), blocks
