"""The prompt positions whose log probabilities a step reports: what to compute, and how the report is cut into messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpu_worker.runner import RowScores, Step
from protocol.columns import Float32, Int32

SLICE = 256  # positions whose logits exist at once, and of one message

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """Positions, flat, in the order of the rows; all arrays have shape [positions]."""

    rows: Int32
    positions: Int32
    behind: Index  # which of the step's tokens, flat, predicts it: the one before
    tokens: Int32  # the prompt's own
    wanted: Int32  # alternatives

    def slices(self) -> Iterator[slice]:
        """Parts of at most SLICE positions."""
        return (slice(at, min(at + SLICE, len(self.rows))) for at in range(0, len(self.rows), SLICE))

    def report(self, part: slice, ids: Int32, values: Float32, ranks: Int32) -> Iterator[RowScores]:
        """A slice's results as they are told, row by row. ids, values: flat, 1 + wanted for each position."""
        rows, positions = self.rows[part], self.positions[part]
        bounds = np.concatenate(([0], np.cumsum(self.wanted[part] + 1)))
        firsts = np.flatnonzero(np.diff(rows, prepend=-1))
        for first, last in zip(firsts.tolist(), [*firsts[1:].tolist(), len(rows)], strict=True):
            pairs = slice(bounds[first], bounds[last])
            yield RowScores(int(rows[first]), int(positions[first]), ids[pairs], values[pairs], ranks[first:last])


def asked(step: Step) -> Asked | None:
    """The positions that a step reports; None if there are none."""
    rows = step.scores.nonzero()[0].astype(np.int32)
    if not len(rows):
        return None
    firsts, starts, records = step.scores[rows], step.starts[rows], [step.records[row] for row in rows.tolist()]
    ends = np.minimum(starts + step.counts[rows], [record.prompt_length - 1 for record in records]) + 1
    counts = ends - firsts
    nth = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    positions = nth + np.repeat(firsts, counts)
    flat = (np.cumsum(step.counts) - step.counts)[rows]
    spans = zip(records, firsts.tolist(), ends.tolist(), strict=True)
    return Asked(
        rows=np.repeat(rows, counts),
        positions=positions.astype(np.int32),
        behind=(positions - 1 + np.repeat(flat - starts, counts)).astype(np.int64),
        tokens=np.concatenate([record.history[first:end] for record, first, end in spans]),
        wanted=np.repeat(np.array([record.params.prompt_logprobs for record in records], np.int32), counts),
    )
