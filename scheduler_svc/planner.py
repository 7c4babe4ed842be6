"""Makes one plan for one worker: who runs in the next step, in which blocks.

A plan never depends on a sampled value: it is made from counts alone, while earlier steps still run. The order:

    1. decodes, one token each; then the next chunk of every prefill, oldest first; all under one token budget
    2. if blocks run out, the newest of the lowest priority is preempted, and nobody is admitted in this step
    3. waiting choices, in order, into free slots, as far as budget and predicted blocks allow

A steady decode step touches whole columns only; Python visits the rows where something happens.
"""

from __future__ import annotations

import numpy as np

from protocol.columns import EMPTY, Int32, pack
from protocol.counters import Counters
from protocol.messages import Admit, Plan
from scheduler_svc.admission import fits
from scheduler_svc.frontends import Frontends
from scheduler_svc.requests import Choice, State
from scheduler_svc.worker import DECODE, DRAIN, PLANNED, PREFILL, Copy, DecodeRows, InFlight, Worker


class Planner:
    """The plan under construction; `make` is all there is to call."""

    def __init__(self, worker: Worker, frontends: Frontends, counters: Counters, chunk_limit: int, trial: int) -> None:
        self.worker = worker
        self.frontends = frontends
        self.counters = counters
        self.chunk_limit = chunk_limit or worker.budget
        self.caching = worker.caching
        self.trial = trial  # suspects that run alone in this step (suspects.py); 0: everyone but suspects
        self.budget = worker.budget
        self.preempted = False
        # single rows (slot, start, count, outputs), behind the decodes
        self.rows: list[tuple[int, int, int, int]] = []
        self.decode_slots = EMPTY
        self.decode_starts = EMPTY
        self.assign: list[tuple[int, int, int]] = []  # slot, index, block
        self.share: list[tuple[Int32, Int32, Int32]] = []
        self.binds: list[tuple[int, int, int]] = []
        self.admits: list[Admit] = []
        self.forks: list[tuple[int, int]] = []  # row (among the single ones), slot
        self.pending: list[tuple[int, bytes]] = []
        self.copies: list[Copy] = []
        self.credit: dict[int, int] = {}  # free tokens per frontend index, as this plan uses them up

    def make(self, now: float) -> Plan | None:
        """Make the plan and enter it among those in flight. None if there is nothing to do."""
        worker = self.worker
        self.copies, worker.copies = worker.copies, []
        decodes = self._decodes()
        self._prefills()
        if not self.preempted and worker.queue:
            self._admissions()
        if not (self.rows or len(self.decode_slots) or ((worker.has_news or self.copies) and not worker.in_flight)):
            worker.copies = self.copies
            return None
        return self._assemble(decodes, now)

    # ------------------------------------------------------------ 1. running sequences

    def _decodes(self) -> DecodeRows | None:
        """Plan one token for every decoding slot that has credit, budget and blocks. Returns the rows if they are all."""
        s = self.worker.slots
        if self.trial:
            return None
        while True:
            everyone = self._decoding()
            slots = everyone.slots
            if not len(slots):
                return None
            slots = self._with_credit(everyone)
            if len(slots) > self.budget:
                turn = self.worker.turn = (self.worker.turn + self.budget) % len(slots)
                slots = np.roll(slots, -turn)[: self.budget]
            whole = slots is everyone.slots
            starts = s.computed[slots]
            grow = np.flatnonzero(starts >= s.capacity[slots])
            if len(grow) <= self.worker.blocks.available:
                break
            if not self._preempt(None):
                # only the oldest is left, or what is about to end holds the blocks: these rows wait for a step
                grow = grow[np.argsort(self._ages(slots[grow]), kind="stable")][self.worker.blocks.available :]
                slots = np.delete(slots, grow)
                whole = False
                starts = s.computed[slots]
                grow = np.flatnonzero(starts >= s.capacity[slots])
                break
        if len(grow):
            self._grow(slots[grow])
        self.decode_slots, self.decode_starts = slots, starts
        self.budget -= len(slots)
        lengths = s.length[slots] + 1
        s.length[slots] = lengths
        s.computed[slots] = starts + 1
        last = slots[lengths >= s.limit[slots]]
        credit = everyone.credit if whole else _per_frontend(s.frontend[slots])
        for index, n in credit:
            self.credit[index] = self._credit(index) - n
        if len(last):
            s.state[last] = PLANNED
            self.worker.decoding = None
        if whole:
            return everyone
        return DecodeRows(slots, s.generation[slots], credit, pack(slots), pack(s.generation[slots]), _ones(len(slots)))

    def _decoding(self) -> DecodeRows:
        rows = self.worker.decoding
        if rows is None:
            s = self.worker.slots
            slots = np.flatnonzero(s.state == DECODE).astype(np.int32)
            generations = s.generation[slots]
            rows = self.worker.decoding = DecodeRows(
                slots, generations, _per_frontend(s.frontend[slots]), pack(slots), pack(generations), _ones(len(slots))
            )
        return rows

    def _with_credit(self, rows: DecodeRows) -> Int32:
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

    def _ages(self, slots: Int32) -> Int32:
        """Rank of each slot among these, oldest first."""
        choices = self.worker.slots.choice
        keys = [choices[slot].key for slot in slots.tolist()]
        ranks = np.empty(len(keys), dtype=np.int32)
        ranks[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys), dtype=np.int32)
        return ranks

    def _credit(self, index: int) -> int:
        if index not in self.credit:
            self.credit[index] = self.frontends.free(self.frontends.at(index))
        return self.credit[index]

    def _grow(self, slots: Int32) -> None:
        """One more block for each of these slots."""
        s = self.worker.slots
        taken = self.worker.blocks.take(len(slots))
        indices = s.blocks[slots]
        s.table[slots, indices] = taken
        s.blocks[slots] = indices + 1
        s.capacity[slots] += self.worker.block_size
        self.assign += zip(slots.tolist(), indices.tolist(), taken, strict=True)

    def _prefills(self) -> None:
        """The next chunk of every prefill that is under way, oldest first."""
        s = self.worker.slots
        slots = np.flatnonzero(s.state == PREFILL)
        if not len(slots):
            return
        for slot in sorted(slots.tolist(), key=lambda slot: s.choice[slot].key):  # type: ignore[union-attr]
            if self.budget <= 0:
                break
            choice = s.choice[slot]
            if s.state[slot] == PREFILL and choice is not None and choice.request.trial == self.trial:
                self._chunk(slot)  # if it was not preempted for an older one meanwhile

    def _chunk(self, slot: int) -> bool:
        """Plan the slot's next chunk, as much of it as budget and blocks allow. False if that is nothing."""
        worker, s, size = self.worker, self.worker.slots, self.worker.block_size
        choice = s.choice[slot]
        assert choice is not None
        start, length = int(s.computed[slot]), int(s.length[slot])
        count = min(length - start, self.budget, self.chunk_limit)
        ends = start + count == length
        outputs = 1 + len(choice.forks)
        if ends and self._credit(choice.request.frontend.index) <= 0:
            return False
        need = -(-(start + count) // size) - int(s.blocks[slot])
        while need > worker.blocks.available:
            if not self._preempt(choice):
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
        row = len(self.rows)
        self.rows.append((slot, start, count, int(ends)))
        if ends:
            self.credit[choice.request.frontend.index] -= outputs
            self._sampled_first(slot, length)
            if choice.forks:
                self._fork(choice, row, end)
        return True

    def _extend(self, slot: int, blocks: list[int]) -> None:
        """Blocks to be written, at the end of the slot's table."""
        s = self.worker.slots
        first = int(s.blocks[slot])
        last = first + len(blocks)
        s.table[slot, first:last] = blocks
        s.blocks[slot] = last
        s.capacity[slot] = last * self.worker.block_size
        self.assign += zip([slot] * len(blocks), range(first, last), blocks, strict=True)

    def _publish(self, slot: int, first: int, last: int) -> None:
        """Blocks first … last − 1 of the slot are full with this plan: later rows may share them from here on."""
        s, blocks = self.worker.slots, self.worker.blocks
        if last <= first:
            return
        names = s.names[slot][first:last]
        for block, name in zip(s.table[slot, first:last].tolist(), names, strict=True):
            if blocks.hash_of[block] is None and blocks.register(block, name):
                self.pending.append((block, name))

    def _sampled_first(self, slot: int, length: int) -> None:
        """The slot's prefill ends in this plan: from the next one on it decodes."""
        s = self.worker.slots
        s.length[slot] = length + 1
        s.state[slot] = PLANNED if length + 1 >= s.limit[slot] else DECODE
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
            self._sampled_first(slot, length)
            self.forks.append((row, slot))

    def _share(self, slot: int, blocks: Int32) -> None:
        """Blocks to be read only, at the head of the slot's empty table."""
        s = self.worker.slots
        n = len(blocks)
        if n:
            self.worker.blocks.share(blocks.tolist())
            s.table[slot, :n] = blocks
            s.blocks[slot] = n
            s.capacity[slot] = n * self.worker.block_size
            self.share.append((np.full(n, slot, dtype=np.int32), np.arange(n, dtype=np.int32), blocks.copy()))

    def _bind(self, choice: Choice) -> int:
        """A slot for a choice, a record for it if its worker has none."""
        worker, request = self.worker, choice.request
        slot = worker.bind(choice, choice.all_tokens)
        if not choice.cached_record:
            worker.records += 1
            choice.cached_record = worker.records
            self.admits.append(Admit(worker.records, request.submit.prompt, pack(choice.tokens), choice.seed, request.params))
        self.binds.append((slot, int(worker.slots.generation[slot]), choice.cached_record))
        return slot

    # ------------------------------------------------------------ 2. preemption

    def _preempt(self, claimant: Choice | None) -> bool:
        """Take the blocks of the newest of the lowest priority, before whom the claimant (None: anyone older) comes.

        The oldest choice whose frontend has credit is never a victim, so that something always moves. False if there
        is no victim.
        """
        s = self.worker.slots
        held = np.flatnonzero((s.state == PREFILL) | (s.state == DECODE)).tolist()
        choices = [c for c in (s.choice[slot] for slot in held) if c is not None]
        oldest = min((c.key for c in choices if not self._owes(c)), default=None)
        planned = {row[0] for row in self.rows}.union(self.decode_slots.tolist())
        victims = [c for c in choices if c.key != oldest and c.slot not in planned and s.blocks[c.slot] and self._yields(c, claimant)]
        if not victims:
            return False
        self.preempted = True
        self.counters.add("scheduler_preemptions")
        preempt(self.worker, max(victims, key=lambda c: (self._owes(c), c.key)))
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
        skipped = 0
        while len(worker.queue) > skipped and self.budget > 0:
            choice = worker.queue[skipped]
            if self._owes(choice) or choice.request.trial != self.trial:
                skipped += 1  # it waits, but nobody else for it
                continue
            stuck = worker.stuck
            if not worker.slots.free or (
                stuck is not None and stuck[0] is choice and worker.blocks.available <= stuck[1] and worker.running
            ):
                fits = False
            else:
                fits = self._admit(choice)
                worker.stuck = None if fits else (choice, worker.blocks.available)
            if not fits:
                if self._may_claim(choice):
                    self._preempt(choice)
                return

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
        hits = [] if choice.no_hits else blocks.match(names, (length - 1) // size)
        idle_hits = sum(not blocks.refs[block] for block in hits)
        if not fits(worker, choice, -(-length // size) - len(hits) + idle_hits):
            return False
        worker.queue.remove(choice)
        if not len(choice.tokens):
            for sibling in request.choices:
                if sibling.queue is worker.queue and not len(sibling.tokens):
                    worker.queue.remove(sibling)
                    sibling.state = State.FORKING
                    choice.forks.append(sibling)
        slot = self._bind(choice)
        s.names[slot] = list(names)
        self._share(slot, np.array(hits, dtype=np.int32))
        choice.shared_blocks = len(hits)
        s.computed[slot] = len(hits) * size
        self.counters.add("scheduler_prefix_queries", length)
        self.counters.add("scheduler_prefix_hits", len(hits) * size)
        if request.cached < 0:
            request.cached = len(hits) * size
            request.frontend.admitted.append((request.handle, request.cached))
        request.admitted = True
        self._chunk(slot)
        return True

    # ------------------------------------------------------------ the message

    def _living_copies(self) -> list[Copy]:
        """The copies whose forks still live; with this plan the sources are free for others."""
        s = self.worker.slots
        self.worker.blocks.release([copy.source for copy in self.copies])
        return [copy for copy in self.copies if s.generation[copy.slot] == copy.generation and s.state[copy.slot] != DRAIN]

    def _assemble(self, decodes: DecodeRows | None, now: float) -> Plan:
        worker, s, size = self.worker, self.worker.slots, self.worker.block_size
        worker.step += 1
        copies = self._living_copies()
        seals = [(block, name) for block, name in worker.seals if worker.blocks.hash_of[block] == name]
        if decodes is None:
            slots = generations = starts = EMPTY
            packed_slots = packed_generations = packed_ones = b""
            credit: list[tuple[int, int]] = []
        else:
            slots, generations, starts = decodes.slots, decodes.generations, self.decode_starts
            packed_slots, packed_generations, packed_ones = decodes.packed_slots, decodes.packed_generations, decodes.packed_ones
            credit = decodes.credit
        packed_starts, packed_counts, packed_outputs = pack(starts), packed_ones, packed_ones
        filled = np.flatnonzero((starts + 1) % size == 0) if self.caching else EMPTY
        flight = InFlight(worker.step, slots, generations, credit)
        if len(filled):
            flight.filled = (slots[filled], generations[filled], starts[filled] + 1)
        flight.pending = self.pending
        flight.row_slots, flight.row_generations = slots, generations
        fork_rows = fork_slots = EMPTY
        if self.rows:
            single = np.array(self.rows, dtype=np.int32).T
            extra = s.generation[single[0]]
            fork_rows = np.array([len(slots) + row for row, _ in self.forks], dtype=np.int32)
            fork_slots = np.array([slot for _, slot in self.forks], dtype=np.int32)
            sampling = single[0][single[3] > 0]
            packed_slots += pack(single[0])
            packed_generations += pack(extra)
            packed_starts += pack(single[1])
            packed_counts += pack(single[2])
            packed_outputs += pack(single[3])
            flight.row_slots = np.concatenate((slots, single[0]))
            flight.row_generations = np.concatenate((generations, extra))
            flight.slots = np.concatenate((slots, sampling, fork_slots))
            flight.generations = s.generation[flight.slots]
            flight.credit = _per_frontend(s.frontend[flight.slots])
        for index, n in flight.credit:
            self.frontends.at(index).in_flight += n
        if not worker.in_flight:
            worker.heard = now
        worker.in_flight.append(flight)
        assign = np.array(self.assign, dtype=np.int32).reshape(-1, 3)
        share = tuple(np.concatenate(column) for column in zip(*self.share, strict=True)) if self.share else (EMPTY,) * 3
        bind = np.array(self.binds, dtype=np.int32).reshape(-1, 3)
        plan = Plan(
            step=worker.step,
            drops=pack(worker.drops),
            frees=pack(worker.frees),
            seals=pack([block for block, _ in seals]),
            seal_hashes=b"".join([name for _, name in seals]),
            withdrawals=pack(worker.withdrawals),
            admits=self.admits,
            bind_slots=pack(bind[:, 0]),
            bind_generations=pack(bind[:, 1]),
            bind_records=pack(bind[:, 2]),
            assign_slots=pack(assign[:, 0]),
            assign_indices=pack(assign[:, 1]),
            assign_blocks=pack(assign[:, 2]),
            share_slots=pack(share[0]),
            share_indices=pack(share[1]),
            share_blocks=pack(share[2]),
            copy_from=pack([copy.source for copy in copies]),
            copy_to=pack([copy.target for copy in copies]),
            slots=packed_slots,
            generations=packed_generations,
            starts=packed_starts,
            counts=packed_counts,
            outputs=packed_outputs,
            fork_rows=pack(fork_rows),
            fork_slots=pack(fork_slots),
        )
        worker.drops, worker.frees, worker.seals, worker.withdrawals = [], [], [], []
        return plan


def preempt(worker: Worker, choice: Choice) -> None:
    """Take a running choice's blocks now and its slot once its last row is acknowledged; then it waits again."""
    s, slot = worker.slots, choice.slot
    detach_forks(worker, choice)
    if s.known[slot] == s.length[slot]:
        worker.unbind(slot)
        worker.queue.add(choice)
        return
    worker.drop_blocks(slot)
    s.state[slot] = DRAIN
    s.computed[slot] = 0
    choice.state = State.DRAINING
    worker.draining.add(slot)
    worker.decoding = None


def detach_forks(worker: Worker, choice: Choice) -> None:
    """Siblings that hoped to share the choice's prefill wait on their own again."""
    for sibling in choice.forks:
        worker.queue.add(sibling)
    choice.forks = []


def _per_frontend(indices: Int32) -> list[tuple[int, int]]:
    """(frontend index, rows) of a column."""
    counts = np.bincount(indices)
    return [(i, int(counts[i])) for i in np.flatnonzero(counts).tolist()]


def _ones(n: int) -> bytes:
    return np.ones(n, dtype="<i4").tobytes()
