"""A plan under construction, and the message and the entry among those in flight that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from protocol.codec import MAX_FRAME
from protocol.columns import EMPTY, Int32, pack
from protocol.messages import Admit, Plan
from scheduler_svc.frontends import Frontends
from scheduler_svc.slots import DRAIN, PLANNED, Index
from scheduler_svc.steps import Copy, DecodeRows, InFlight, per_frontend
from scheduler_svc.worker import Worker

Entries = tuple[Index, Int32, Int32]  # slots, indices, blocks of tables
ROOM = MAX_FRAME // 4  # bytes of admitted choices and shared tables; one choice may go over it, and is at most MAX_SUBMIT
NONE_FILLED: tuple[Index, Int32, Int32] = (np.zeros(0, dtype=np.intp), EMPTY, EMPTY)


@dataclass(slots=True)
class Draft:
    """Decodes come first, as whole columns; single rows behind them."""

    decodes: DecodeRows | None = None
    starts: Int32 = field(default_factory=lambda: EMPTY)  # of the decodes
    filled: tuple[Index, Int32, Int32] = NONE_FILLED  # slots among them whose last block this step fills (`InFlight`)
    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)  # slot, start, count, outputs, first score
    assign: list[Entries] = field(default_factory=list)
    share: list[Entries] = field(default_factory=list)
    binds: list[tuple[int, int, int]] = field(default_factory=list)  # slot, generation, record
    admits: list[Admit] = field(default_factory=list)
    forks: list[tuple[int, int]] = field(default_factory=list)  # row (among the single ones), slot
    pending: list[tuple[int, bytes]] = field(default_factory=list)  # prompt blocks that this step fills, their names
    copies: list[Copy] = field(default_factory=list)
    returns: list[tuple[int, int]] = field(default_factory=list)  # host blocks to copy back, and where to
    size: int = 0  # bytes of `admits` and `share`

    @property
    def is_full(self) -> bool:
        """Whether another choice must wait for the next plan: the message has a bound."""
        return self.size >= ROOM


def assemble(worker: Worker, draft: Draft, frontends: Frontends, now: float) -> Plan:
    """Turn the draft into the next plan, which takes along all that the worker should hear, and enter it in flight."""
    s, decodes = worker.slots, draft.decodes
    worker.step += 1
    copies = _living_copies(worker, draft.copies)
    seals = [(block, name) for block, name in worker.seals if worker.blocks.hash_of[block] == name]
    if decodes is None:
        decodes = worker.rows_of(np.zeros(0, dtype=np.intp))
    packed = [decodes.slots_packed, decodes.generations_packed, pack(draft.starts), decodes.ones_packed, decodes.ones_packed]
    flight = InFlight(
        step=worker.step,
        version=worker.version,
        slots=decodes.slots,
        generations=decodes.generations,
        credit=decodes.credit,
        decoding=decodes,
        filled=draft.filled,
        pending=draft.pending,
        row_slots=decodes.slots,
        row_generations=decodes.generations,
        decodes=len(decodes.slots),
        sent=now,
        alone=not worker.in_flight,
    )
    scored = b""
    fork_rows, fork_slots = [len(decodes.slots) + row for row, _ in draft.forks], [slot for _, slot in draft.forks]
    if draft.rows:
        slots, starts, counts, outputs, scores = np.array(draft.rows, dtype=np.int32).T
        generations = s.generation[slots]
        packed = [a + pack(b) for a, b in zip(packed, (slots, generations, starts, counts, outputs), strict=True)]
        flight.row_slots = np.concatenate((decodes.slots, slots))
        flight.row_generations = np.concatenate((decodes.generations, generations))
        flight.slots = np.concatenate((decodes.slots, slots[outputs > 0], np.array(fork_slots, dtype=np.intp)))
        flight.generations = s.generation[flight.slots]
        flight.credit = per_frontend(s.frontend[flight.slots])
        flight.decoding = None
        flight.prefilled = int(counts.sum())
        if scores.any():
            scored = bytes(4 * len(decodes.slots)) + pack(scores)
            last = slots[(scores > 0) & (s.state[slots] == PLANNED)]
            flight.scored = list(zip(last.tolist(), s.generation[last].tolist(), strict=True))
    for index, n in flight.credit:
        frontends.at(index).in_flight += n
    if not worker.in_flight:
        worker.heard = now
    worker.in_flight.append(flight)
    out_from, out_to = worker.host.send(worker.step) if worker.host.leaving else ([], [])
    flight.copied = len(out_from) + len(draft.returns)
    assign, share, bind = _entries(draft.assign), _entries(draft.share), _columns(draft.binds)
    plan = Plan(
        step=worker.step,
        drops=_column(worker.drops),
        frees=_column(worker.frees),
        seals=_column([block for block, _ in seals]),
        seal_hashes=b"".join([name for _, name in seals]),
        withdrawals=_column(worker.withdrawals),
        admits=draft.admits,
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
        out_from=_column(out_from),
        out_to=_column(out_to),
        in_from=_column([host for host, _ in draft.returns]),
        in_to=_column([block for _, block in draft.returns]),
        slots=packed[0],
        generations=packed[1],
        starts=packed[2],
        counts=packed[3],
        outputs=packed[4],
        fork_rows=_column(fork_rows),
        fork_slots=_column(fork_slots),
        scores=scored,
    )
    worker.drops, worker.frees, worker.seals, worker.withdrawals = [], [], [], []
    return plan


def _living_copies(worker: Worker, copies: list[Copy]) -> list[Copy]:
    """The copies whose forks still live; with this plan the sources are free for others."""
    if not copies:
        return copies
    s = worker.slots
    worker.blocks.release([copy.source for copy in copies])
    return [copy for copy in copies if s.generation[copy.slot] == copy.generation and s.state[copy.slot] != DRAIN]


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
    if not parts:
        return b"", b"", b""
    first, second, third = (pack(np.concatenate([part[i] for part in parts])) for i in range(3))
    return first, second, third
