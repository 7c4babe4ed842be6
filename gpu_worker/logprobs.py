"""Log probabilities of the model itself: of the logits before any edit and at temperature 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.prompt_scores import Asked
from gpu_worker.runner import RowScores
from protocol.columns import EMPTY, Float32, Int32


@dataclass
class Candidates:
    """What must be known of logits before they are edited, for the rows that report logprobs."""

    rows: Int32  # which rows of the logits
    wanted: Int32  # alternatives per row
    logits: torch.Tensor  # [rows, vocab]
    normaliser: torch.Tensor  # float32 [rows]: log Σ exp
    top_values: torch.Tensor  # [rows, k]
    top_ids: torch.Tensor


@dataclass
class Logprobs:
    """The columns of an Outcome: see protocol.messages.Tokens."""

    counts: Int32
    ids: Int32
    values: Float32
    ranks: Int32


def candidates(logits: torch.Tensor, wanted: Int32) -> Candidates | None:
    """Take the best tokens of logits [n, vocab] for the rows where `wanted` [n] is 0 or more."""
    rows = np.flatnonzero(wanted >= 0).astype(np.int32)
    if not len(rows):
        return None
    taken = logits[torch.from_numpy(rows.astype(np.int64)).to(logits.device)]
    # in float64 the order of summation, which depends on the number of rows, is lost in the rounding
    normaliser = torch.logsumexp(taken.double(), dim=1).float()
    k = min(int(wanted[rows].max()), logits.shape[1])
    top_values, top_ids = taken.topk(k, dim=1) if k else (taken[:, :0], torch.zeros_like(taken[:, :0], dtype=torch.int64))
    return Candidates(rows, np.minimum(wanted[rows], k), taken, normaliser, top_values, top_ids)


def logprobs(found: Candidates, tokens: Int32) -> Logprobs:
    """Logprobs of the sampled tokens [n] (−1: none) and their alternatives, the sampled token first."""
    device = found.logits.device
    chosen = tokens[found.rows]
    ids = torch.from_numpy(np.maximum(chosen, 0).astype(np.int64)).to(device)
    own = found.logits.gather(1, ids[:, None])
    ranks = (found.logits > own).sum(dim=1) + 1
    all_ids = torch.cat((ids[:, None], found.top_ids), dim=1).cpu().numpy()
    all_values = (torch.cat((own, found.top_values), dim=1) - found.normaliser[:, None]).cpu().numpy()
    got = chosen >= 0
    per_row = np.where(got, found.wanted + 1, 0)
    reported = np.arange(all_ids.shape[1]) < per_row[:, None]
    counts = np.zeros(len(tokens), np.int32)
    counts[found.rows] = per_row
    return Logprobs(
        counts=counts,
        ids=all_ids[reported].astype(np.int32),
        values=all_values[reported].astype(np.float32),
        ranks=ranks.cpu().numpy()[got].astype(np.int32),
    )


def prompt_scores(asked: Asked, logits: Callable[[slice], torch.Tensor]) -> list[RowScores]:
    """What a step reports of its prompts. `logits(part)`: float32 [positions, vocab] of a slice, made when it is called for."""
    told: list[RowScores] = []
    for part in asked.slices():
        found = candidates(logits(part), asked.wanted[part])
        assert found is not None
        of_slice = logprobs(found, asked.tokens[part])
        told += asked.report(part, of_slice.ids, of_slice.values, of_slice.ranks)
    return told


NO_LOGPROBS = Logprobs(EMPTY, EMPTY, np.zeros(0, np.float32), EMPTY)
