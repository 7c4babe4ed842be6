"""A worker's state on the device: slot table, inputs of the step, and the two rings in mapped host memory.

A plan's columns go into the plan ring (pinned host memory, which kernels read over the bus; `kernels/plan.cu` gives the
layout) and the sampler writes into the result ring: no copy-engine operation, no synchronisation, and a CUDA graph finds
its entry through a counter on the device. Entries are reused in order, once the step that used them has ended.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from msgspec import structs

from gpu_worker.cuda.build import TILE
from gpu_worker.runner import Record, Step
from protocol.columns import Int32, UInt8, unpack
from protocol.messages import Geometry, Plan

HEADER = 16
PARAMETERS = 32  # words of a slot: slot, temperature, seed (2), number of stop ids, stop ids
MAX_STOP_IDS = PARAMETERS - 5
MAX_ASSIGNMENTS = 16384  # of one ring entry; a plan with more takes several
MAX_CHUNK = 16  # tiles of an item, unless the work list would grow beyond its bound
_NO_ASSIGNMENTS: Int32 = np.zeros((0, 4), np.int32)
MANY_ROWS = 9  # rows from which on neighbours that share a prefix are served together, where that is wanted


def is_decode(step: Step) -> bool:
    """Whether every row computes and samples one token, and nothing else happens: what a captured graph can do."""
    p = step.plan
    # Counts are 1 at least and outputs at most: columns that are equal hold nothing but ones.
    return bool(p.slots) and p.counts == p.outputs and not (p.fork_slots or p.copy_from or p.out_from or p.in_from)


def block_copies(plan: Plan) -> tuple[tuple[bytes, bytes], ...]:
    """Columns (from, to) of a plan's block copies: within the card, to the host, from the host."""
    return (plan.copy_from, plan.copy_to), (plan.out_from, plan.out_to), (plan.in_from, plan.in_to)


def least_tiles(rows: int) -> int:
    """Tiles that an item of the work list holds at least: few rows are split finely, or most of the card idles."""
    return 1 if rows <= 2 else 2 if rows <= 4 else 4


def split_limit(rows: int, max_len: int, spread: int) -> int:
    """Most items that splitting rows may add to one item a row: what bounds the partial results' memory."""
    return max(spread, min(rows * -(-max_len // TILE) // MAX_CHUNK, 2048))


def max_items(rows: int, max_len: int, spread: int, pack: int = 1) -> int:
    """Upper bound of the work list that `prepare` makes for `rows` sequences of at most `max_len` tokens, up to `pack` of them a group.

    Rows may share blocks: the size of the pool bounds nothing here. A group, which has two rows at least, may add an item.
    """
    finest = rows * -(-max_len // (least_tiles(rows) * TILE))
    groups = rows // 2 if pack > 1 else 0
    return max(min(rows + split_limit(rows, max_len, spread), finest), rows) + groups


def max_partials(rows: int, max_len: int, spread: int, pack: int = 1) -> int:
    """Upper bound of the partial results of such a list: a span of a group gives one to each of its rows."""
    return max_items(rows, max_len, spread) + (rows if pack > 1 else 0)


class DeviceState:
    """Tensors on the card and rings beside it. `slots` rows and a dummy one, whose blocks are all the dummy block."""

    def __init__(
        self, geometry: Geometry, device: torch.device, spread: int, tile_tokens: int, entries: int = 16, results: int = 64, pack: int = 1
    ) -> None:
        """pack: rows that an item of the decode attention may serve; 1: its own."""
        g = self.geometry = geometry
        if g.slots > 1024:
            raise ValueError(f"max_num_seqs: {g.slots} is more than 1024, the rows that one block of `prepare` handles")
        self.spread, self.tile_tokens, self.pack = spread, tile_tokens, pack

        def words(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.table = words(g.slots + 1, g.table_width)
        self.parameters = words(g.slots + 1, PARAMETERS)
        self.last_token, self.dead = words(g.slots + 1), words(g.slots + 1)
        self.rows, self.outputs = words(g.slots, 8), words(g.slots, 4)
        self.max_tokens = max(g.max_step_tokens, g.slots)  # a decode step is padded to slots at most
        self.tokens, self.positions, self.places = (words(self.max_tokens) for _ in range(3))
        self.max_tiles = -(-g.max_step_tokens // tile_tokens) + g.slots
        self.tiles = words(self.max_tiles, 2)
        self.logit_rows = words(g.slots)
        self.max_items, self.max_partials = (
            max(bound(rows, g.max_model_len, spread, pack) for rows in range(1, g.slots + 1)) for bound in (max_items, max_partials)
        )
        self.items = words(self.max_items, 8)
        self.step = words(8)

        self.entries, self.results = entries, results
        self.result_words = 4 + 2 * g.slots
        self._mapped = device.type == "cuda"  # pinned memory is mapped: kernels use the host's address
        self.result_ring = torch.zeros((results, self.result_words), dtype=torch.int32, pin_memory=self._mapped)
        self._results: Int32 = self.result_ring.numpy()
        self.position = 0  # entries written
        self.guards: list[torch.cuda.Event | None] = [None] * entries

        self.slots_arguments = (*(t.data_ptr() for t in (self.table, self.parameters, self.last_token, self.dead)), g.slots, g.table_width)
        self.inputs_arguments = tuple(
            t.data_ptr()
            for t in (self.rows, self.outputs, self.tokens, self.positions, self.places, self.tiles, self.logit_rows, self.items, self.step)
        )
        self.hold(g.blocks)

    def hold(self, blocks: int) -> None:
        """Name that many blocks from now on, the one behind them being the dummy block; forgets all slots. Nothing may be in flight."""
        g = self.geometry = structs.replace(self.geometry, blocks=blocks)
        self.max_copies = g.blocks + g.host_blocks  # of one step: no two have one target
        self.entry_words = (
            (
                HEADER
                + 4 * MAX_ASSIGNMENTS
                + g.slots * (8 + PARAMETERS + 4 + 1 + 2)
                + g.max_step_tokens
                + 2 * self.max_tiles
                + 2 * self.max_copies
                + 128
            )
            // 4
            * 4
        )
        self.ring = torch.zeros((self.entries, self.entry_words), dtype=torch.int32, pin_memory=self._mapped)
        self._ring: Int32 = self.ring.numpy()
        self.reset()

    def items_launched(self, bucket: int) -> int:
        """Programs (per KV head) of the decode attention for a bucket."""
        return max_items(bucket, self.geometry.max_model_len, self.spread, self.pack) if bucket else 0

    def prepare_arguments(self, bucket: int, decode: bool, tokens: int = 0, tiles: int = 0) -> tuple[int, ...]:
        """Those of the kernel `prepare`, for `bucket` rows launched and, but for a decode step, so many tokens and tiles."""
        g = self.geometry
        return (
            *self.slots_arguments,
            *self.inputs_arguments,
            self.ring.data_ptr(),
            self.entry_words,
            self.entries,
            self.result_ring.data_ptr(),
            self.result_words // 2,  # counted in 8-byte words
            bucket,
            self.items_launched(bucket),
            self.spread,
            least_tiles(bucket),
            split_limit(bucket, g.max_model_len, self.spread),
            g.block_size,
            int(decode),
            tokens,
            tiles,
            g.blocks,
        )

    def reset(self) -> None:
        """Forget all slots. Nothing may be in flight."""
        self.table.fill_(self.geometry.blocks)
        self.dead.zero_()
        self.step[0] = self.position  # a step that failed may have been written and never read

    def write(self, step: Step, result: int) -> Iterator[int]:
        """Write a step into as many ring entries as it needs (all but the last hold assignments only); yield each one's
        number once it is written. The caller launches `prepare` for it and leaves an event in `guards`, reached when the
        entry has been read."""
        assignments = _assignments(step.plan)
        while len(assignments) > MAX_ASSIGNMENTS:
            yield self._entry(result, assignments[:MAX_ASSIGNMENTS])
            assignments = assignments[MAX_ASSIGNMENTS:]
        yield self._entry(result, assignments, step)

    def _entry(self, result: int, assignments: Int32, step: Step | None = None) -> int:
        number = self.position % self.entries
        self.position += 1
        guard = self.guards[number]
        if guard is not None:
            guard.synchronize()
        entry = self._ring[number]
        header = entry[:HEADER]
        header[:] = 0
        header[5] = result
        at = HEADER + 8 * (len(step.slots) if step is not None else 0)

        def put(count_at: int, offset_at: int, values: Int32, count: int) -> None:
            nonlocal at
            header[count_at], header[offset_at] = count, at  # where there is no count, the offset stands in both
            entry[at : at + values.size] = values.reshape(-1)
            at += -(-values.size // 4) * 4

        if len(assignments):
            put(3, 10, assignments, len(assignments))
        if step is not None:
            if len(step.bind_slots):
                put(4, 11, _bindings(step.bind_slots, step.bind_records), len(step.bind_slots))
            count = len(step.slots)
            ends = step.counts.cumsum(dtype=np.int32)
            rows = entry[HEADER : HEADER + 8 * count].reshape(count, 8).T
            rows[0], rows[1], rows[2], rows[3] = step.slots, step.starts, step.counts, step.known
            rows[4] = ends - step.counts
            rows[5:] = 0
            if len(step.prefill):
                rows[5] = step.known.cumsum() - step.known
                rows[6] = step.prefill[np.minimum(rows[5], len(step.prefill) - 1)]
            header[0] = count
            header[1] = ends[-1] if count else 0
            if is_decode(step):
                header[2] = count  # the kernel makes the rest
                return number
            sampled = np.flatnonzero(step.outputs)
            logit_row = np.cumsum(step.outputs > 0) - 1
            outputs = np.zeros((len(sampled) + len(step.fork_slots), 4), dtype=np.int32)
            outputs[:, 0] = np.concatenate((logit_row[sampled], logit_row[step.fork_rows]))
            outputs[:, 1], outputs[:, 2] = step.output_slots, step.output_positions
            put(2, 12, outputs, len(outputs))
            put(13, 13, step.prefill, at)
            put(8, 15, (ends[sampled] - 1).astype(np.int32), len(sampled))
            tiles = self._tiles(step.starts, step.counts)
            put(7, 14, tiles, len(tiles))
            copies = np.concatenate([np.stack((unpack(a), unpack(b)), axis=1) for a, b in block_copies(step.plan)])
            if len(copies) > self.max_copies:
                raise ValueError(f"a plan copies {len(copies)} blocks; there are {self.max_copies}")
            put(9, 9, copies, at)
        return number

    def _tiles(self, starts: Int32, counts: Int32) -> Int32:
        """Tiles of the prefill attention, shape [tiles, 2]: row, first token in the row; those with most keys first."""
        per_row = -(-counts // self.tile_tokens)
        row = np.repeat(np.arange(len(counts), dtype=np.int32), per_row)
        first = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        tiles = np.stack((row, first * self.tile_tokens), axis=1).astype(np.int32)
        return tiles[np.argsort(-(starts[row] + tiles[:, 1]), kind="stable")]

    def read(self, result: int, outputs: int) -> tuple[Int32, UInt8, int, int]:
        """Tokens and flags (shapes [outputs]) of a finished step, its start and end in nanoseconds of the card's clock."""
        words, slots = self._results[result], self.geometry.slots
        start, end = words[:4].view(np.int64).tolist()
        return words[4 : 4 + outputs].copy(), words[4 + slots : 4 + slots + outputs].astype(np.uint8), start, end


def _assignments(plan: Plan) -> Int32:
    """What the plan enters into block tables, shape [entries, 4]: slot, index, block, 0."""
    if not plan.assign_slots and not plan.share_slots:
        return _NO_ASSIGNMENTS
    columns = plan.assign_slots + plan.share_slots, plan.assign_indices + plan.share_indices, plan.assign_blocks + plan.share_blocks
    entries = np.zeros((len(columns[0]) // 4, 4), dtype=np.int32)
    for at, column in enumerate(columns):
        entries[:, at] = unpack(column)
    return entries


def _bindings(slots: Int32, records: list[Record]) -> Int32:
    """Parameters of bound slots, shape [slots, PARAMETERS]."""
    words = np.zeros((len(slots), PARAMETERS), dtype=np.int32)
    for row, slot, record in zip(words, slots, records, strict=True):
        stops = unpack(record.params.stop_ids)[:MAX_STOP_IDS]  # a record with more is sampled by `general.py`
        row[0] = slot
        row[1:2].view(np.float32)[0] = record.params.temperature
        row[2:4].view(np.uint64)[0] = record.seed
        row[4] = len(stops)
        row[5 : 5 + len(stops)] = stops
    return words
