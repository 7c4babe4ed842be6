"""What the scheduler keeps of a step: its decoding rows, while they stay the same, and its plan, until the result has come."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from protocol.columns import Int32
from scheduler_svc.slots import Index


@dataclass(slots=True)
class DecodeRows:
    """Slots that decode together, with whatever their messages need of them that does not change from step to step.

    Arrays have shape [rows], in the order of the slots; `mask` and `one` have shape [slots] and are True and 1 at these:
    adding `one` to a column moves all of them for a quarter of the cost of indexing.
    """

    slots: Index
    mask: npt.NDArray[np.bool_]
    one: Int32
    generations: Int32
    credit: list[tuple[int, int]]  # (frontend index, rows)
    prompts: Int32  # lengths
    base: Index  # where each slot's history begins in the flat one
    slots_packed: bytes
    generations_packed: bytes
    ones_packed: bytes
    handles_packed: bytes
    indices_packed: bytes


@dataclass(slots=True)
class InFlight:
    """A plan until its result has come. Arrays have shape [outputs], in the result's order."""

    step: int
    version: int  # the worker's, when the plan was made: equal to the present one, every row still has its owner
    slots: Index
    generations: Int32
    credit: list[tuple[int, int]]  # (frontend index, sampling rows)
    decoding: DecodeRows | None  # the rows, if the step does nothing else
    filled: tuple[Index, Int32, Int32]  # decoding slots whose last block this step fills, generations, indices of these blocks
    pending: list[tuple[int, bytes]]  # prompt blocks that this step fills
    row_slots: Index  # every row's, sampling or not
    row_generations: Int32
    decodes: int  # of these rows, the first ones; the others compute a chunk of a prefill
    sent: float  # when
    alone: bool  # nothing else was in flight then
    prefilled: int = 0  # tokens of rows that are no decodes
    copied: int = 0  # blocks copied from or to the host
    scored: list[tuple[int, int]] = field(default_factory=list)  # slots, generations of scorers whose last row it holds


@dataclass(slots=True)
class Copy:
    """A fork's copy of a partly filled block, for the head of the next plan. It holds a reference on its source."""

    source: int
    target: int
    slot: int
    generation: int


def per_frontend(indices: Int32) -> list[tuple[int, int]]:
    """(frontend index, rows) of a column."""
    counts = np.bincount(indices)
    return [(i, int(counts[i])) for i in counts.nonzero()[0].tolist()]
