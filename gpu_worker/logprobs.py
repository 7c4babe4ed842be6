"""Log probabilities of the model itself: of the logits before any edit and at temperature 1.

They are computed where the logits lie, and become columns of an outcome on the host, once they have arrived there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.prompt_scores import Asked
from gpu_worker.runner import RowScores
from gpu_worker.transfer import Arrival
from protocol.columns import EMPTY, Float32, Int32


@dataclass(frozen=True)
class Reported:
    """The rows of logits that report log probabilities."""

    rows: Int32
    wanted: Int32  # alternatives of each
    index: torch.Tensor  # `rows` on the device, int64


@dataclass(frozen=True)
class Candidates:
    """What must be known of logits before they are edited, for the rows that report logprobs."""

    logits: torch.Tensor  # [rows, vocab]
    normaliser: torch.Tensor  # float32 [rows]: log Σ exp
    top_values: torch.Tensor  # [rows, k]
    top_ids: torch.Tensor


@dataclass(frozen=True)
class Told:
    """A token's logprob and its alternatives', the token first; on the device."""

    ids: torch.Tensor  # int32 [rows, 1 + k]
    values: torch.Tensor  # float32 [rows, 1 + k]
    ranks: torch.Tensor  # int32 [rows]

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As an Arrival takes them."""
        return self.ids, self.values, self.ranks


@dataclass(frozen=True)
class Logprobs:
    """The columns of an Outcome: see protocol.messages.Tokens."""

    counts: Int32
    ids: Int32
    values: Float32
    ranks: Int32


def candidates(logits: torch.Tensor, alternatives: int) -> Candidates:
    """Take the best tokens of logits [rows, vocab], so many alternatives of each row."""
    # in float64 the order of summation, which depends on the number of rows, is lost in the rounding
    normaliser = torch.logsumexp(logits.double(), dim=1).float()
    k = min(alternatives, logits.shape[1])
    top_values, top_ids = logits.topk(k, dim=1) if k else (logits[:, :0], torch.zeros_like(logits[:, :0], dtype=torch.int64))
    return Candidates(logits, normaliser, top_values, top_ids)


def told(found: Candidates, tokens: torch.Tensor) -> Told:
    """Logprobs of tokens (int64 [rows]; where there is none, any) and of their alternatives."""
    ids = tokens[:, None]
    own = found.logits.gather(1, ids)
    return Told(
        ids=torch.cat((ids, found.top_ids), dim=1).int(),
        values=torch.cat((own, found.top_values), dim=1) - found.normaliser[:, None],
        ranks=((found.logits > own).sum(dim=1) + 1).int(),
    )


def columns(rows: Int32, wanted: Int32, tokens: Int32, ids: Int32, values: Float32, ranks: Int32) -> Logprobs:
    """An outcome's columns of what was told.

    rows: the outputs that report. wanted: their numbers of alternatives. tokens: those of all outputs, −1 where there is none,
    of which nothing is reported. ids, values, ranks: as in Told.
    """
    got = tokens[rows] >= 0
    per_row = np.where(got, np.minimum(wanted, ids.shape[1] - 1) + 1, 0)
    reported = np.arange(ids.shape[1]) < per_row[:, None]
    counts = np.zeros(len(tokens), np.int32)
    counts[rows] = per_row
    return Logprobs(counts, ids[reported], values[reported], ranks[got])


class PromptScores:
    """What a step reports of its prompts, on its way to the host."""

    def __init__(self, asked: Asked, tokens: torch.Tensor, logits: Callable[[slice], torch.Tensor]) -> None:
        """Enqueue what computes it, a slice after another.

        tokens: the prompts' own, int64 [positions]. `logits(part)`: float32 [positions, vocab] of a slice, made when it is called for.
        """
        self._asked = asked
        slices = [told(candidates(logits(part), int(asked.wanted[part].max())), tokens[part]) for part in asked.slices()]
        self._arrival = Arrival(*(tensor for one in slices for tensor in one.tensors))

    def read(self) -> list[RowScores]:
        """In the order of rows and positions. An event recorded behind this must have been reached."""
        arrays, asked = iter(self._arrival.read()), self._asked
        scores: list[RowScores] = []
        for part in asked.slices():
            rows = np.arange(part.stop - part.start, dtype=np.int32)
            of_slice = columns(rows, asked.wanted[part], asked.tokens[part], next(arrays), next(arrays), next(arrays))
            scores += asked.report(part, of_slice.ids, of_slice.values, of_slice.ranks)
        return scores


NO_LOGPROBS = Logprobs(EMPTY, EMPTY, np.zeros(0, np.float32), EMPTY)
