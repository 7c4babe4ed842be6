"""The host's slot table: which record runs in which slot, under which generation; the block tables; the sealed hashes.

A plan is applied in the order of its fields: drops and frees, seals and withdrawals, admits and binds, assignments
(which forget a block's hash before the step's first write) and shares, copies, rows. `WorkerCore.apply` keeps that
order; the classes here are the three kinds of state it keeps. All index arrays are int32 and within the geometry.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_worker.runner import Record
from protocol.columns import Int32, pack, unpack
from protocol.messages import Plan

UNASSIGNED = -1  # entry of a block table that no plan has filled
UNBOUND = -1  # generation of a slot without a record


class PlanError(Exception):
    """A plan that contradicts what the worker holds; the step has failed. `field` names the column."""

    def __init__(self, step: int, field: str, why: str) -> None:
        super().__init__(f"plan {step}: {field}: {why}")
        self.step = step
        self.field = field


class BlockTables:
    """Block tables of all slots: `table[slot, i]` is the block with tokens i·block_size … of the slot's sequence.

    `table` is int32, shape [slots, table_width]; UNASSIGNED where no plan has named a block since the slot was bound.
    """

    def __init__(self, slots: int, table_width: int) -> None:
        self.table: Int32 = np.full((slots, table_width), UNASSIGNED, dtype=np.int32)

    def apply(self, plan: Plan) -> None:
        """Empty the tables of the slots that the plan binds, then enter its assigned and shared blocks."""
        if plan.bind_slots:
            self.table[unpack(plan.bind_slots)] = UNASSIGNED
        if plan.assign_slots:
            self.table[unpack(plan.assign_slots), unpack(plan.assign_indices)] = unpack(plan.assign_blocks)
        if plan.share_slots:
            self.table[unpack(plan.share_slots), unpack(plan.share_indices)] = unpack(plan.share_blocks)

    def clear(self) -> None:
        """Forget every entry: the session is over."""
        self.table.fill(UNASSIGNED)


@dataclass(frozen=True, slots=True)
class Rows:
    """The slots of a step's rows with what is bound to them, a record or a number (shapes [rows]) each; as in `Slots`."""

    slots: Int32
    records: list[Record]
    known: Int32
    capacity: Int32


class Slots:
    """Slots and what is bound to them: columns of shape [slots], and the records beside them.

    `known` is the length of the record when it was bound: positions below it are read from the record's history,
    the ones behind it are sampled in this slot one after another. `capacity` is the size of that history.
    """

    def __init__(self, slots: int) -> None:
        self.records: list[Record | None] = [None] * slots
        self.generation: Int32 = np.full(slots, UNBOUND, dtype=np.int32)
        self.known: Int32 = np.zeros(slots, dtype=np.int32)
        self.capacity: Int32 = np.zeros(slots, dtype=np.int32)
        self.bound = 0  # slots that are
        self._named: tuple[bytes, bytes] | None = None  # the slots and generations that were asked for last, and their rows
        self._rows: Rows

    def rows_of(self, plan: Plan) -> Rows:
        """The rows of a plan. Raises PlanError for a slot that occurs twice, or is not at the generation named.

        In steady decoding every step names the same slots, so the last answer is kept: that is half of what a step's rows take.
        """
        named = plan.slots, plan.generations
        if named != self._named:
            self._rows, self._named = self._look_up(plan), named
        return self._rows

    def _look_up(self, plan: Plan) -> Rows:
        slots = unpack(plan.slots)
        numbers = slots.tolist()
        if len(set(numbers)) != len(numbers):
            raise PlanError(plan.step, "slots", "a slot has two rows")
        held = self.generation[slots]
        wrong = (held != unpack(plan.generations)) | (held == UNBOUND)
        if wrong.any():
            slot, generation = slots[wrong][0], held[wrong][0]
            raise PlanError(plan.step, "generations", f"slot {slot} is {f'at {generation}' if generation != UNBOUND else 'not bound'}")
        records: list[Record] = [self.records[slot] for slot in numbers]  # all are bound, so none is None
        return Rows(slots, records, self.known[slots], self.capacity[slots])

    def bind(self, slot: int, generation: int, record: Record) -> None:
        """Let `record` run in `slot`; rows name the slot with this generation from now on."""
        self.bound += self.records[slot] is None
        self.records[slot] = record
        self.generation[slot] = generation
        self.known[slot] = record.length
        self.capacity[slot] = len(record.history)
        self._named = None

    def free(self, slot: int) -> None:
        """Unbind a slot. A free slot stays free."""
        self.bound -= self.records[slot] is not None
        self.records[slot] = None
        self.generation[slot] = UNBOUND
        self._named = None

    def clear(self) -> None:
        """Unbind all slots: the session is over, and generations with it."""
        self.records = [None] * len(self.records)
        self.bound = 0
        self.generation.fill(UNBOUND)
        self._named = None


class SealedBlocks:
    """Blocks whose content is final and named by a 16-byte hash; what a worker reports when a session opens."""

    def __init__(self, blocks: int) -> None:
        self._sealed = np.zeros(blocks, dtype=np.bool_)
        self._hashes = np.zeros((blocks, 16), dtype=np.uint8)

    def seal(self, blocks: Int32, hashes: np.ndarray) -> None:
        """Name blocks (shape [n]) by their hashes (uint8, shape [n, 16])."""
        self._sealed[blocks] = True
        self._hashes[blocks] = hashes

    def expect(self, blocks: Int32, hashes: np.ndarray) -> None:
        """Blocks copied from others with these hashes: not sealed, but if their content is withdrawn, so is those others'."""
        self._hashes[blocks] = hashes

    def forget(self, blocks: Int32) -> None:
        """The content of these blocks (shape [n]) changes, or is not to be trusted."""
        self._sealed[blocks] = False
        self._hashes[blocks] = 0

    def forget_copies(self, hashes: np.ndarray) -> None:
        """Forget every block that has one of these hashes (uint8, shape [n, 16])."""
        named = np.flatnonzero(self._sealed)
        wrong = np.isin(self._hashes[named].view("S16")[:, 0], hashes.view("S16"))
        self._sealed[named[wrong]] = False

    def lookup(self, blocks: Int32) -> tuple[np.ndarray, np.ndarray]:
        """Which of these blocks (shape [n]) are sealed (bool, shape [n]), and all their hashes (uint8, shape [n, 16])."""
        return self._sealed[blocks], self._hashes[blocks]

    def columns(self) -> tuple[bytes, bytes]:
        """The sealed blocks and their hashes, as READY carries them."""
        blocks = np.flatnonzero(self._sealed)
        return pack(blocks), self._hashes[blocks].tobytes()

    def clear(self) -> None:
        """Forget all: another hash key names blocks differently."""
        self._sealed.fill(False)
