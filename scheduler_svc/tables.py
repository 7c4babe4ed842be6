"""What a plan writes into block tables: the scheduler's own, and by the draft the worker's."""

from __future__ import annotations

import numpy as np

from protocol.columns import Int32, pack
from protocol.messages import Admit
from scheduler_svc.draft import Draft, Entries
from scheduler_svc.requests import Choice
from scheduler_svc.slots import Index
from scheduler_svc.worker import Worker


def bind(worker: Worker, draft: Draft, choice: Choice) -> int:
    """A slot for a choice, a record for it if its worker has none."""
    slot = worker.bind(choice, choice.all_tokens)
    if not choice.cached_record:
        worker.records += 1
        choice.cached_record = worker.records
        told = choice.request.submit
        admit = Admit(worker.records, told.prompt, pack(choice.tokens), choice.seed, told.params, told.trace)
        draft.admits.append(admit)
        draft.size += admit.size
    draft.binds.append((slot, int(worker.slots.generation[slot]), choice.cached_record))
    return slot


def share(worker: Worker, draft: Draft, slot: int, blocks: Int32) -> None:
    """Blocks to be read only, at the head of the slot's empty table."""
    s, n = worker.slots, len(blocks)
    if n:
        worker.blocks.share(blocks.tolist())
        s.table[slot, :n] = blocks
        s.blocks[slot] = n
        s.capacity[slot] = n * worker.block_size
        draft.share.append(_entries(slot, 0, blocks))
        draft.size += 12 * n  # slot, index, block


def extend(worker: Worker, draft: Draft, slot: int, blocks: list[int]) -> None:
    """Blocks to be written, at the end of the slot's table."""
    s = worker.slots
    first = int(s.blocks[slot])
    last = first + len(blocks)
    entries = np.array(blocks, dtype=np.int32)
    s.table[slot, first:last] = entries
    s.blocks[slot] = last
    s.capacity[slot] = last * worker.block_size
    draft.assign.append(_entries(slot, first, entries))


def grow(worker: Worker, draft: Draft, slots: Index) -> None:
    """One more block for each of these slots."""
    s = worker.slots
    taken = np.array(worker.blocks.take(len(slots)), dtype=np.int32)
    indices = s.blocks[slots]
    s.table[slots, indices] = taken
    s.blocks[slots] = indices + 1
    s.capacity[slots] += worker.block_size
    draft.assign.append((slots, indices, taken))


def publish(worker: Worker, draft: Draft, slot: int, first: int, last: int) -> None:
    """Blocks first … last − 1 of the slot are full with this plan: later rows may share them from here on."""
    s = worker.slots
    if worker.caching and last > first:
        draft.pending += worker.blocks.publish(s.table[slot, first:last].tolist(), s.names[slot][first:last])


def bring_back(worker: Worker, draft: Draft, slot: int, host: list[int], computed: int) -> None:
    """Copy blocks back from host memory, to the end of the slot's table; with them it has so many tokens computed."""
    s = worker.slots
    first = int(s.blocks[slot])
    blocks = worker.blocks.take(len(host))
    extend(worker, draft, slot, blocks)
    draft.returns += zip(host, blocks, strict=True)
    s.computed[slot] = computed
    publish(worker, draft, slot, first, computed // worker.block_size)


def _entries(slot: int, first: int, blocks: Int32) -> Entries:
    """Entries of one slot's table from index `first` on."""
    return np.full(len(blocks), slot), np.arange(first, first + len(blocks), dtype=np.int32), blocks
