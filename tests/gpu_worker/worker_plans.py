"""A planner for tests: makes random plans, all of them legal, and keeps what the results say.

It has a scheduler's duties (blocks, slots, references) and none of its wisdom: what it admits, chunks, shares, forks,
preempts and swaps is drawn from a seeded generator. Plans stay ahead of results by up to two steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np

from protocol.columns import pack, unpack
from protocol.messages import STOPPED, Admit, Geometry, Plan, Result, SamplingParams


@dataclass(eq=False)
class Sequence:
    """One choice and where it stands; `computed` and `planned` run ahead of `known` by what is in flight."""

    record: int
    prompt: list[int]
    seed: int
    params: SamplingParams
    children: list[Sequence] = field(default_factory=list)
    known: list[int] = field(default_factory=list)  # sampled
    computed: int = 0
    planned: int = 0  # tokens sampled or asked for
    slot: int = -1
    generation: int = -1
    table: list[int] = field(default_factory=list)
    host: list[int] = field(default_factory=list)
    flying: int = 0
    admitted: bool = False
    ended: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt) + self.planned

    @property
    def full(self) -> bool:
        return self.planned >= self.params.max_tokens


@dataclass
class Columns:
    """A plan's columns while they are being filled."""

    lists: dict[str, list[int]] = field(default_factory=dict)
    admits: list[Admit] = field(default_factory=list)
    hashes: bytes = b""

    def add(self, **values: int) -> None:
        for name, value in values.items():
            self.lists.setdefault(name, []).append(value)

    def plan(self, step: int) -> Plan:
        return Plan(step, admits=self.admits, seal_hashes=self.hashes, **{name: pack(values) for name, values in self.lists.items()})


class RandomPlanner:
    """Drives sequences to their end. `check()` after every step; `done` once nothing is left."""

    def __init__(self, geometry: Geometry, sequences: list[Sequence], random: Random) -> None:
        self.geometry = geometry
        self.random = random
        self.waiting = list(sequences)
        self.everything = [*sequences, *(child for s in sequences for child in s.children)]
        self.swapped: list[Sequence] = []
        self.running: list[Sequence] = []
        self.free = list(range(geometry.blocks))
        self.free_host = list(range(geometry.host_blocks))
        self.free_slots = list(range(geometry.slots))
        self.references: Counter[int] = Counter()
        self.generations = [0] * geometry.slots
        self.flying: list[tuple[Plan, list[Sequence], list[Callable[[], None]]]] = []
        self.step = 0
        self.copies: list[tuple[int, int]] = []  # partial blocks of forks, for the head of the next plan
        self.copied: list[Callable[[], None]] = []  # what to do once the copies of the plan being made are complete
        self.events: Counter[str] = Counter()

    @property
    def done(self) -> bool:
        return all(s.ended for s in self.everything) and not self.flying

    # ------------------------------------------------------------ a plan

    def next_plan(self) -> Plan:
        self.step += 1
        columns = Columns()
        self.copied = []
        for source, target in self.copies:
            columns.add(copy_from=source, copy_to=target)
        self.copies, copies = [], self.copies
        for sequence in list(self.running):
            self._retire(sequence, columns)
        rows: list[tuple[Sequence, int, int, int]] = []
        budget = self.geometry.max_step_tokens
        preempted = self.random.random() < 0.15 and self._preempt(columns)
        for sequence in self.random.sample(self.running, len(self.running)):
            if self.random.random() < 0.9:
                budget -= self._row(sequence, budget, rows, columns)
        if not preempted:
            while self.random.random() < 0.8 and self._admit(columns):
                budget -= self._row(self.running[-1], budget, rows, columns)
        self.random.shuffle(rows)
        sampled = [s for s, _, _, outputs in rows if outputs]
        for i, (sequence, start, count, outputs) in enumerate(rows):
            columns.add(slots=sequence.slot, generations=sequence.generation, starts=start, counts=count, outputs=outputs)
            if outputs and sequence.children:
                sampled += self._fork(i, sequence, columns)
        for source, _ in copies:
            self._release([source])
        plan = columns.plan(self.step)
        self.flying.append((plan, sampled, self.copied))
        return plan

    def _bind(self, sequence: Sequence, columns: Columns) -> None:
        if not sequence.admitted:
            sequence.admitted = True
            columns.admits.append(Admit(sequence.record, pack(sequence.prompt), b"", sequence.seed, sequence.params))
        sequence.slot = self.free_slots.pop(self.random.randrange(len(self.free_slots)))
        self.generations[sequence.slot] += 1
        sequence.generation = self.generations[sequence.slot]
        sequence.table = []
        columns.add(bind_slots=sequence.slot, bind_generations=sequence.generation, bind_records=sequence.record)
        self.running.append(sequence)

    def _admit(self, columns: Columns) -> bool:
        ready = [s for s in self.waiting + self.swapped if not s.flying]
        if not ready or not self.free_slots:
            return False
        sequence = self.random.choice(ready)
        if sequence in self.swapped:
            if len(self.free) < len(sequence.host):
                return False
            self.swapped.remove(sequence)
            self._bind(sequence, columns)
            host, sequence.host = sequence.host, []
            for source in host:
                columns.add(in_from=source, in_to=self._assign(sequence, columns))
            self.copied.append(lambda: self.free_host.extend(host))
            self.events["swap in"] += 1
            return True
        if len(self.free) < 2:
            return False
        self.waiting.remove(sequence)
        self._bind(sequence, columns)
        sequence.computed = 0
        self._share(sequence, columns)
        return True

    def _share(self, sequence: Sequence, columns: Columns) -> None:
        size = self.geometry.block_size
        tokens = sequence.prompt + sequence.known
        for other in self.running:
            theirs = other.prompt + other.known  # the token that ended it was never computed: its row was dead
            while other is not sequence and self.random.random() < 0.9:
                index = len(sequence.table)
                end = (index + 1) * size
                if end > len(tokens) - 1 or end > min(other.computed, len(theirs) - other.ended) or tokens[:end] != theirs[:end]:
                    break
                block = other.table[index]
                self.references[block] += 1
                sequence.table.append(block)
                sequence.computed = end
                columns.add(share_slots=sequence.slot, share_indices=index, share_blocks=block)
                self.events["shared"] += 1

    def _assign(self, sequence: Sequence, columns: Columns) -> int:
        block = self.free.pop(self.random.randrange(len(self.free)))
        assert self.references[block] == 0
        self.references[block] = 1
        columns.add(assign_slots=sequence.slot, assign_indices=len(sequence.table), assign_blocks=block)
        sequence.table.append(block)
        return block

    def _row(self, sequence: Sequence, budget: int, rows: list[tuple[Sequence, int, int, int]], columns: Columns) -> int:
        """Add a row for the sequence if it fits; returns how many tokens it computes."""
        left = sequence.length - sequence.computed
        if sequence.full or left <= 0 or budget <= 0:
            return 0
        count = min(left, budget, self.random.randint(1, 2 * self.geometry.block_size) if left > 1 else 1)
        size = self.geometry.block_size
        needed = -(-(sequence.computed + count) // size) - len(sequence.table)
        if needed > len(self.free):
            return 0
        for _ in range(needed):
            self._assign(sequence, columns)
        outputs = int(count == left)
        rows.append((sequence, sequence.computed, count, outputs))
        sequence.computed += count
        sequence.planned += outputs
        sequence.flying += outputs
        self.events["chunk"] += 1 - outputs
        return count

    def _fork(self, row: int, parent: Sequence, columns: Columns) -> list[Sequence]:
        size = self.geometry.block_size
        forked = []
        for child in parent.children:
            if not self.free_slots or not self.free:
                self.waiting.append(child)  # no room: it resumes alone
                continue
            self._bind(child, columns)
            full, rest = divmod(len(parent.prompt), size)
            for index, block in enumerate(parent.table[:full]):
                self.references[block] += 1
                child.table.append(block)
                columns.add(share_slots=child.slot, share_indices=index, share_blocks=block)
            if rest:
                self.references[parent.table[full]] += 1
                self.copies.append((parent.table[full], self._assign(child, columns)))
            child.computed, child.planned, child.flying = len(parent.prompt), 1, 1
            columns.add(fork_rows=row, fork_slots=child.slot)
            forked.append(child)
            self.events["fork"] += 1
        parent.children = []
        return forked

    def _release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free.append(block)

    def _unbind(self, sequence: Sequence, columns: Columns) -> None:
        columns.add(frees=sequence.slot)
        self.free_slots.append(sequence.slot)
        self.running.remove(sequence)

    def _retire(self, sequence: Sequence, columns: Columns) -> None:
        """An ended sequence gives everything back; a block may be somebody else's in this very plan."""
        if sequence.ended or (sequence.full and self.random.random() < 0.5):
            self._unbind(sequence, columns)
            self._release(sequence.table)
            columns.add(drops=sequence.record)
            sequence.slot = -1

    def _preempt(self, columns: Columns) -> bool:
        victims = [s for s in self.running if s.computed and not (s.flying or s.full or s.ended)]
        if not victims:
            return False
        victim = self.random.choice(victims)
        self._unbind(victim, columns)
        if self.random.random() < 0.5 and len(victim.table) <= len(self.free_host):
            victim.host = [self.free_host.pop() for _ in victim.table]
            for source, target in zip(victim.table, victim.host):
                columns.add(out_from=source, out_to=target)
            victim.flying = 1
            self.copied.append(lambda: self._swapped_out(victim))
            self.events["swap out"] += 1
        else:
            self._release(victim.table)
            self.waiting.append(victim)
            self.events["recompute"] += 1
        return True

    def _swapped_out(self, victim: Sequence) -> None:
        """Blocks under a copy wait for its acknowledgement."""
        self._release(victim.table)
        victim.flying = 0
        self.swapped.append(victim)

    # ------------------------------------------------------------ a result

    def take(self, result: Result) -> None:
        plan, sampled, copied = self.flying.pop(0)
        assert result.step == plan.step
        ids = iter(unpack(result.ids).tolist())
        counts = unpack(result.counts).tolist()
        assert len(counts) == len(sampled)
        for sequence, count, flag in zip(sampled, counts, result.flags):
            sequence.flying -= 1
            for _ in range(count):
                assert not sequence.ended, "a token behind the end"
                sequence.known.append(next(ids))
            if flag & STOPPED or len(sequence.known) == sequence.params.max_tokens:
                sequence.ended = True
        assert result.copied >= plan.step
        for complete in copied:
            complete()

    def check(self) -> None:
        """Every block is free or referenced, and no block is written by two."""
        assert sorted(self.free + [b for b, n in self.references.items() if n]) == list(range(self.geometry.blocks))


def draw_sequences(random: Random, n: int, geometry: Geometry, params: list[SamplingParams]) -> list[Sequence]:
    """Sequences with prompts that share prefixes often; some have a second choice."""
    stem = [random.randrange(97, 123) for _ in range(geometry.max_model_len)]
    sequences = []
    for i in range(n):
        shared = random.randrange(0, geometry.max_model_len // 3)
        prompt = stem[:shared] + [random.randrange(97, 123) for _ in range(random.randint(1, geometry.max_model_len // 4))]
        chosen = random.choice(params)
        sequence = Sequence(2 * i, prompt, random.getrandbits(64), chosen)
        if random.random() < 0.3:
            sequence.children.append(Sequence(2 * i + 1, prompt, random.getrandbits(64), chosen))
        sequences.append(sequence)
    return sequences


def rows_of(**columns: list[int]) -> dict[str, bytes]:
    """Columns of a plan written as lists."""
    return {name: pack(np.array(values, np.int32)) for name, values in columns.items()}
