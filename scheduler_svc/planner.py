"""Makes one plan for one worker: who runs in the next step, in which blocks.

A plan never depends on a sampled value: it is made from counts alone, while earlier steps still run. The order:

    1. decodes, one token each; then the next chunk of every prefill, oldest first; all under one token budget
    2. if blocks run out, the newest of the lowest priority is preempted, and nobody is admitted in this step
    3. waiting choices, in order, into free slots, as far as budget and predicted blocks allow

A steady decode step touches whole columns only; Python visits the rows where something happens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol.columns import EMPTY, Int32, pack
from protocol.counters import Counters
from protocol.messages import Admit, Plan
from scheduler_svc.admission import fits
from scheduler_svc.frontends import Frontends
from scheduler_svc.requests import Choice, State
from scheduler_svc.worker import DECODE, DRAIN, PLANNED, PREFILL, Copy, DecodeRows, Index, InFlight, Worker, per_frontend

Entries = tuple[Sequence[int] | Index, Sequence[int] | Int32, Sequence[int] | Int32]  # slots, indices, blocks of tables
NONE_FILLED: tuple[Index, Int32] = (np.zeros(0, dtype=np.intp), EMPTY)


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
        self.decodes: DecodeRows | None = None
        self.starts = EMPTY  # of the decodes
        self.filled: tuple[Index, Int32] = NONE_FILLED
        self.assign: list[Entries] = []
        self.share: list[Entries] = []
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
        self._decodes()
        self._prefills()
        if not self.preempted and worker.queue:
            self._admissions()
        if not (self.rows or self.decodes or ((worker.has_news or self.copies) and not worker.in_flight)):
            worker.copies = self.copies
            return None
        return self._assemble(now)

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
            if not self._preempt(None):
                # only the oldest is left, or what is about to end holds the blocks: these rows wait for a step
                left_out = grow[np.argsort(self._ages(grow), kind="stable")][worker.blocks.available :]
                rows = worker.rows_of(np.setdiff1d(rows.slots, left_out))
                grow = np.setdiff1d(grow, left_out)
                break
        if not len(rows.slots):
            return
        if len(grow):
            self._grow(grow)
        self.decodes = rows
        self.starts = s.computed[rows.slots]
        self.budget -= len(rows.slots)
        s.length += rows.mask
        s.computed += rows.mask
        for index, n in rows.credit:
            self.credit[index] = self._credit(index) - n
        if worker.caching:
            full = (rows.mask & (s.computed == s.capacity)).nonzero()[0]
            self.filled = (full, s.generation[full])
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
        self.assign.append((slots, indices, taken))

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
        self.assign.append(([slot] * len(blocks), range(first, last), blocks))

    def _publish(self, slot: int, first: int, last: int) -> None:
        """Blocks first … last − 1 of the slot are full with this plan: later rows may share them from here on."""
        s, blocks = self.worker.slots, self.worker.blocks
        if last <= first:
            return
        self.pending += blocks.publish(s.table[slot, first:last].tolist(), s.names[slot][first:last])

    def _sampled_first(self, slot: int, length: int) -> None:
        """The slot's prefill ends in this plan: from the next one on it decodes."""
        s = self.worker.slots
        s.length[slot] = length + 1
        s.state[slot] = PLANNED if length + 1 >= s.limit[slot] else DECODE
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
            self.share.append(([slot] * n, range(n), blocks.tolist()))

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
        # those planned already keep their blocks for this step, unless nothing more is planned after the claim
        planned = {copy.slot for copy in self.copies}
        if claimant is None or claimant.slot >= 0:
            planned |= {row[0] for row in self.rows}.union(self.decodes.slots.tolist() if self.decodes else ())
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
        while self.budget > 0:
            choice = worker.queue.first(lambda index: self._credit(index) <= 0, self.trial)
            if choice is None:
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
                if not worker.draining and self._may_claim(choice):
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
        worker.queue.charge(choice, length - len(hits) * size + min(choice.limit - length, worker.model.outputs.expected))
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

    def _assemble(self, now: float) -> Plan:
        worker, s, decodes = self.worker, self.worker.slots, self.decodes
        worker.step += 1
        copies = self._living_copies()
        seals = [(block, name) for block, name in worker.seals if worker.blocks.hash_of[block] == name]
        if decodes is None:
            decodes = worker.rows_of(np.zeros(0, dtype=np.intp))
        packed = [decodes.slots_packed, decodes.generations_packed, pack(self.starts), decodes.ones_packed, decodes.ones_packed]
        flight = InFlight(
            step=worker.step,
            version=worker.version,
            slots=decodes.slots,
            generations=decodes.generations,
            credit=decodes.credit,
            decoding=decodes,
            filled=self.filled,
            pending=self.pending,
            row_slots=decodes.slots,
            row_generations=decodes.generations,
        )
        fork_rows, fork_slots = [len(decodes.slots) + row for row, _ in self.forks], [slot for _, slot in self.forks]
        if self.rows:
            slots, starts, counts, outputs = np.array(self.rows, dtype=np.int32).T
            generations = s.generation[slots]
            packed = [a + pack(b) for a, b in zip(packed, (slots, generations, starts, counts, outputs), strict=True)]
            flight.row_slots = np.concatenate((decodes.slots, slots))
            flight.row_generations = np.concatenate((decodes.generations, generations))
            flight.slots = np.concatenate((decodes.slots, slots[outputs > 0], np.array(fork_slots, dtype=np.intp)))
            flight.generations = s.generation[flight.slots]
            flight.credit = per_frontend(s.frontend[flight.slots])
            flight.decoding = None
        for index, n in flight.credit:
            self.frontends.at(index).in_flight += n
        if not worker.in_flight:
            worker.heard = now
        worker.in_flight.append(flight)
        assign, share, bind = _entries(self.assign), _entries(self.share), _columns(self.binds)
        plan = Plan(
            step=worker.step,
            drops=_column(worker.drops),
            frees=_column(worker.frees),
            seals=_column([block for block, _ in seals]),
            seal_hashes=b"".join([name for _, name in seals]),
            withdrawals=_column(worker.withdrawals),
            admits=self.admits,
            bind_slots=bind[0],
            bind_generations=bind[1],
            bind_records=bind[2],
            assign_slots=assign[0],
            assign_indices=assign[1],
            assign_blocks=assign[2],
            share_slots=share[0],
            share_indices=share[1],
            share_blocks=share[2],
            copy_from=_column([copy.source for copy in copies]),
            copy_to=_column([copy.target for copy in copies]),
            slots=packed[0],
            generations=packed[1],
            starts=packed[2],
            counts=packed[3],
            outputs=packed[4],
            fork_rows=_column(fork_rows),
            fork_slots=_column(fork_slots),
        )
        worker.drops, worker.frees, worker.seals, worker.withdrawals = [], [], [], []
        return plan


def _column(values: Sequence[int]) -> bytes:
    """Most columns of most plans are empty."""
    return pack(values) if values else b""


def _columns(entries: list[tuple[int, int, int]]) -> tuple[bytes, bytes, bytes]:
    if not entries:
        return b"", b"", b""
    first, second, third = np.array(entries, dtype=np.int32).T
    return pack(first), pack(second), pack(third)


def _entries(parts: list[Entries]) -> tuple[bytes, bytes, bytes]:
    """Columns of slots, indices and blocks."""
    first, second, third = ([np.asarray(part[i], dtype="<i4").tobytes() for part in parts] for i in range(3))
    return b"".join(first), b"".join(second), b"".join(third)


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
    worker.prefilling.discard(slot)
    s.computed[slot] = 0
    choice.state = State.DRAINING
    worker.draining.add(slot)
    worker.decoding = None


def detach_forks(worker: Worker, choice: Choice) -> None:
    """Siblings that hoped to share the choice's prefill wait on their own again."""
    for sibling in choice.forks:
        worker.queue.add(sibling)
    choice.forks = []
