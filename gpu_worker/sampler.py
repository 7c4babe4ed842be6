"""From logits to tokens: a function of (seed, position) and the logits, in any slot, batch or worker.

Order, as in vLLM: edits (penalties, bias, allowed and banned ids), temperature, min-p, top-k, top-p; then the token with
the largest sum of logit and Gumbel variate, which is a draw from the softmax (Maddison, Tarlow, Minka 2014). Each filter is
a threshold on the logits' values, so equal logits are kept or dropped together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.logit_edits import LogitEdits
from gpu_worker.logprobs import NO_LOGPROBS, Logprobs, candidates, logprobs
from gpu_worker.philox import GUMBEL_HIGH, GUMBEL_LOW, gumbel, philox
from gpu_worker.runner import Record
from protocol.columns import Int32

_SORTED_FIRST = 1024  # best tokens in which top-p is looked for before everything is sorted


@dataclass
class Sampled:
    """One token for each row of the logits; shapes [n]."""

    tokens: Int32  # −1 where the logits held a NaN or nothing may be sampled
    logprobs: Logprobs


class Sampler:
    """The sampling parameters of every slot, set when a record is bound."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._edits = LogitEdits(slots, vocab_size, device)
        self._temperature = np.zeros(slots, np.float32)
        self._top_k = np.zeros(slots, np.int64)  # 0: off
        self._top_p = np.ones(slots, np.float32)
        self._min_p = np.zeros(slots, np.float32)
        self._seed = np.zeros(slots, np.uint64)
        self._logprobs = np.full(slots, -1, np.int32)

    def bind(self, slot: int, record: Record) -> None:
        """A record takes a slot."""
        p = record.params
        self._temperature[slot] = p.temperature
        self._top_k[slot] = max(p.top_k, 0)
        self._top_p[slot] = p.top_p
        self._min_p[slot] = p.min_p
        self._seed[slot] = record.seed
        self._logprobs[slot] = p.logprobs
        self._edits.bind(slot, record)

    def sample(self, logits: torch.Tensor, slots: Int32, positions: Int32, live: np.ndarray, mask: torch.Tensor | None = None) -> Sampled:
        """Sample one token a row. The logits are used up.

        logits: float32 [n, vocab]. slots, positions: whose row it is and where its token will stand. live: bool [n]; other
        rows get −1. mask: int32 [n, ⌈vocab / 32⌉], bit i of a row allows token i (a grammar's).
        """
        found = candidates(logits, np.where(live, self._logprobs[slots], -1))
        if mask is not None:
            logits.masked_fill_(~_bits(mask, logits.shape[1]), -torch.inf)
        self._edits.apply(logits, slots, positions)
        best, tokens = logits.max(dim=1)
        random = np.flatnonzero(live & (self._temperature[slots] > 0))
        if len(random):
            rows = self._index(random)
            tokens[rows] = self._draw(logits[rows], slots[random], positions[random])
        usable = (torch.isfinite(best)).cpu().numpy() & live  # max is NaN if any logit is
        chosen = np.where(usable, tokens.cpu().numpy(), -1).astype(np.int32)
        if usable.any():
            taken = np.flatnonzero(usable)
            self._edits.took(slots[taken], tokens[self._index(taken)])
        return Sampled(chosen, NO_LOGPROBS if found is None else logprobs(found, chosen))

    def _draw(self, logits: torch.Tensor, slots: Int32, positions: Int32) -> torch.Tensor:
        """Tokens drawn from logits [n, vocab], which are used up."""
        scaled = logits.div_(self._floats(self._temperature[slots]))
        threshold = self._threshold(scaled, slots)
        # whatever lies further below the best can win against no variate
        threshold = torch.maximum(threshold, scaled.amax(dim=1, keepdim=True) + (GUMBEL_LOW - GUMBEL_HIGH))
        scaled.masked_fill_(scaled < threshold, -torch.inf)
        rest = -scaled.shape[1] % 4
        if rest:
            scaled = torch.nn.functional.pad(scaled, (0, rest), value=-torch.inf)
        fours = scaled.view(len(slots), -1, 4)
        row, four = (fours.amax(dim=2) > -torch.inf).nonzero(as_tuple=True)
        seeds = self._seed[slots]
        low, high = self._index(seeds & np.uint64(0xFFFFFFFF)), self._index(seeds >> np.uint64(32))
        words = philox((low[row], high[row]), (self._index(positions)[row], four))
        fours[row, four] += gumbel(torch.stack(words, dim=1))
        return scaled.argmax(dim=1)

    def _threshold(self, scaled: torch.Tensor, slots: Int32) -> torch.Tensor:
        """The least scaled logit that min-p, top-k and top-p leave, [n, 1]."""
        top_k, top_p, min_p = self._top_k[slots], self._top_p[slots], self._min_p[slots]
        threshold = torch.full((len(slots), 1), -torch.inf, device=self._device)
        if min_p.any():
            threshold = scaled.amax(dim=1, keepdim=True) + self._floats(min_p).log()
        some = np.flatnonzero((top_k > 0) & (top_k < scaled.shape[1]))
        if len(some):
            rows, k = self._index(some), top_k[some]
            kth = scaled[rows].topk(int(k.max()), dim=1).values.gather(1, self._index(k - 1)[:, None])
            threshold[rows] = torch.maximum(threshold[rows], kth)
        some = np.flatnonzero(top_p < 1)
        if len(some):
            rows = self._index(some)
            least = _top_p(scaled[rows], threshold[rows], self._floats(top_p[some]))
            threshold[rows] = torch.maximum(threshold[rows], least)
        return threshold

    def _floats(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self._device).unsqueeze(1)

    def _index(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device)


def _top_p(scaled: torch.Tensor, threshold: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The least value in the smallest set of best tokens whose probability reaches p; all shapes [n, 1] but `scaled`.

    Only tokens not below the threshold count. In float64, so that neither order nor number of rows matters.
    """
    weights = (scaled.double() - scaled.amax(dim=1, keepdim=True)).exp_().masked_fill_(scaled < threshold, 0.0)
    goal = weights.sum(dim=1, keepdim=True) * p.double()
    first = min(_SORTED_FIRST, scaled.shape[1])
    best, where = weights.topk(first, dim=1)
    if bool((best.sum(dim=1, keepdim=True) < goal).any()):
        best, where = weights.sort(dim=1, descending=True)
    before = best.cumsum(dim=1) - best
    last = (before < goal).sum(dim=1, keepdim=True) - 1
    return scaled.gather(1, where.gather(1, last.clamp_(min=0)))


def _bits(mask: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """bool [n, vocab] of packed int32 words."""
    shifts = torch.arange(32, device=mask.device, dtype=torch.int32)
    return ((mask.unsqueeze(2) >> shifts) & 1).bool().view(len(mask), -1)[:, :vocab_size]
