"""From logits to tokens: a function of (seed, position) and the logits, in any slot, batch or worker.

Order, as in vLLM: edits (penalties, bias, allowed and banned ids), temperature, min-p, top-k, top-p; then the token with
the largest sum of logit and Gumbel variate, which is a draw from the softmax (Maddison, Tarlow, Minka 2014). Each filter is
a threshold on the logits' values, so equal logits are kept or dropped together.

Everything lies on the device and stays there: which rows need what is known from the parameters on the host, so that no step
waits for a device. On the CPU, where looking costs nothing, work that turns out not to be needed is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.logit_edits import LogitEdits
from gpu_worker.logprobs import Candidates, Reported, Told, candidates, told
from gpu_worker.philox import GUMBEL_HIGH, GUMBEL_LOW, gumbel, philox
from gpu_worker.runner import Record
from gpu_worker.transfer import upload
from protocol.columns import Int32

SORTED_AT_ONCE = 1 << 23  # logits that top-k and top-p sort at a time: 64 bytes each in float64 weights and sums, values, places
_SORTED_FIRST = 1024  # best tokens in which top-p is looked for before everything is sorted


@dataclass(frozen=True)
class Sampled:
    """One token for each row of the logits, on the device."""

    tokens: torch.Tensor  # int64 [n]; −1 where the logits held a NaN or nothing may be sampled
    reported: Reported | None
    told: Told | None  # of the rows reported


@dataclass(frozen=True)
class Filters:
    """Rows with a filter; parameters of shape [rows, 1] beside them."""

    rows: torch.Tensor  # int64, in the logits
    temperature: torch.Tensor
    log_min_p: torch.Tensor  # −∞: off
    with_k: torch.Tensor  # int64, in `rows`
    kth: torch.Tensor  # int64: k − 1
    largest_k: int  # 0: none
    with_p: torch.Tensor  # int64, in `rows`
    p: torch.Tensor  # float64
    every_k: torch.Tensor  # int32 [rows], 0: off
    every_p: torch.Tensor  # float32 [rows], 1: off
    p_within: int  # so many best tokens hold whatever top-p keeps, but for some equal to the last of them; 0: none


@dataclass(frozen=True)
class _Draws:
    """Rows that draw, rather than take the best."""

    rows: Int32
    index: torch.Tensor  # `rows` on the device, int64
    temperature: torch.Tensor  # [rows, 1]
    low: torch.Tensor  # 32 bits of the seed, int64 [rows]
    high: torch.Tensor


@dataclass(frozen=True)
class _Rows:
    """The rows of a step: whose they are, and what they ask for."""

    slots: torch.Tensor  # int64 [n]
    reported: Reported | None
    filters: Filters | None
    draws: _Draws | None


class Sampler:
    """The sampling parameters of every slot, set when a record is bound."""

    def __init__(
        self, slots: int, vocab_size: int, device: torch.device, filter: Callable[[torch.Tensor, Filters], None] | None = None
    ) -> None:
        """filter: what does the work of `filter_logits`, by default that."""
        self._device = device
        self._filter = filter or filter_logits
        self._vocab_size = vocab_size
        self._edits = LogitEdits(slots, vocab_size, device)
        self._temperature = np.zeros(slots, np.float32)
        self._top_k = np.zeros(slots, np.int64)  # 0: off
        self._top_p = np.ones(slots, np.float32)
        self._min_p = np.zeros(slots, np.float32)
        self._seed = np.zeros(slots, np.uint64)
        self._logprobs = np.full(slots, -1, np.int32)
        self._rows: _Rows | None = None  # of the last step: in steady decoding the next one's, too
        self._rows_of = b""

    def bind(self, slot: int, record: Record) -> None:
        """A record takes a slot."""
        p = record.params
        self._temperature[slot] = p.temperature
        self._top_k[slot] = p.top_k if 0 < p.top_k < self._vocab_size else 0
        self._top_p[slot] = p.top_p
        self._min_p[slot] = p.min_p
        self._seed[slot] = record.seed
        self._logprobs[slot] = p.logprobs
        self._rows = None
        self._edits.bind(slot, record)

    def sample(self, logits: torch.Tensor, slots: Int32, positions: Int32, mask: torch.Tensor | None = None) -> Sampled:
        """Sample one token a row. The logits are used up.

        logits: float32 [n, vocab]. slots, positions: whose row it is and where its token will stand, on the host.
        mask: int32 [n, ⌈vocab / 32⌉], bit i of a row allows token i (a grammar's).
        """
        found = self.prepare(logits, slots, positions, mask)
        tokens = self.draw(logits, slots, positions)
        return Sampled(tokens, self.reported(slots), self.took(slots, tokens.clamp(min=0), found))

    def prepare(self, logits: torch.Tensor, slots: Int32, positions: Int32, mask: torch.Tensor | None = None) -> Candidates | None:
        """All that comes before a draw, in place: edits, and −∞ where a filter leaves nothing. As in `sample`."""
        rows = self._rows_for(slots)
        found = None
        if rows.reported is not None:
            found = candidates(logits[rows.reported.index], int(rows.reported.wanted.max()))
        if mask is not None:
            logits.masked_fill_(~_bits(mask, logits.shape[1]), -torch.inf)
        self._edits.apply(logits, slots, positions)
        if rows.filters is not None:
            self._filter(logits, rows.filters)
        return found

    def draw(self, logits: torch.Tensor, slots: Int32, positions: Int32) -> torch.Tensor:
        """Tokens (int64 [n]) of prepared logits, which are used up: the best, or drawn at the row's temperature."""
        best, tokens = _best(logits)
        draws = self._rows_for(slots).draws
        if draws is not None:
            (at,) = upload(self._device, positions[draws.rows].astype(np.int64))
            tokens = tokens.index_copy(0, draws.index, _draw(logits[draws.index].div_(draws.temperature), draws, at))
        return tokens.masked_fill_(~torch.isfinite(best), -1)  # the best is NaN if any logit is

    def took(self, slots: Int32, tokens: torch.Tensor, found: Candidates | None) -> Told | None:
        """Count tokens (int64 [n], 0 or more) that were sampled for these slots; what is told of them.

        A slot whose logits gave none is dead until a record is bound to it: what it is given does not matter.
        """
        self._edits.took(slots, tokens)
        reported = self.reported(slots)
        return None if found is None or reported is None else told(found, tokens[reported.index])

    def wants_tokens(self, slots: Int32) -> bool:
        """Whether `took` does anything for these slots."""
        return self.reported(slots) is not None or self._edits.counts(slots)

    def reported(self, slots: Int32) -> Reported | None:
        """Which rows report log probabilities."""
        return self._rows_for(slots).reported

    def on_device(self, slots: Int32) -> torch.Tensor:
        """The slots of a step's rows as an index on the device, int64 [n]."""
        return self._rows_for(slots).slots

    def _rows_for(self, slots: Int32) -> _Rows:
        key = slots.tobytes()
        if self._rows is None or key != self._rows_of:
            self._rows, self._rows_of = self._spread(slots), key
        return self._rows

    def _spread(self, slots: Int32) -> _Rows:
        temperature, top_k, top_p, min_p = (column[slots] for column in (self._temperature, self._top_k, self._top_p, self._min_p))
        drawn = np.flatnonzero(temperature > 0)
        filtered = np.flatnonzero((temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)))
        reporting = np.flatnonzero(self._logprobs[slots] >= 0)
        k, p = top_k[filtered], top_p[filtered]
        with_k, with_p = np.flatnonzero(k > 0), np.flatnonzero(p < 1)
        seeds = self._seed[slots[drawn]]
        with np.errstate(divide="ignore"):
            log_min_p = np.log(min_p[filtered])
        spread = {
            "slots": slots.astype(np.int64),
            "reporting": reporting,
            "drawn": drawn,
            "drawn_temperature": temperature[drawn, None],
            "low": (seeds & np.uint64(0xFFFFFFFF)).astype(np.int64),
            "high": (seeds >> np.uint64(32)).astype(np.int64),
            "filtered": filtered,
            "temperature": temperature[filtered, None],
            "log_min_p": log_min_p[:, None],
            "with_k": with_k,
            "kth": k[with_k, None] - 1,
            "with_p": with_p,
            "p": p[with_p, None].astype(np.float64),
            "every_k": k.astype(np.int32),
            "every_p": p,
        }
        t = dict(zip(spread, upload(self._device, *spread.values()), strict=True))
        reported, draws, filters = None, None, None
        if len(reporting):
            reported = Reported(reporting.astype(np.int32), self._logprobs[slots[reporting]], t["reporting"])
        if len(drawn):
            draws = _Draws(drawn.astype(np.int32), t["drawn"], t["drawn_temperature"], t["low"], t["high"])
        if len(filtered):
            within = int(np.where(k[with_p] > 0, k[with_p], self._vocab_size).max(initial=0))
            filters = Filters(
                rows=t["filtered"],
                temperature=t["temperature"],
                log_min_p=t["log_min_p"],
                with_k=t["with_k"],
                kth=t["kth"],
                largest_k=int(k.max(initial=0)),
                with_p=t["with_p"],
                p=t["p"],
                every_k=t["every_k"],
                every_p=t["every_p"],
                p_within=within,
            )
        return _Rows(t["slots"], reported, filters, draws)


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest value of each row, NaN if there is one, and where it stands first."""
    if logits.device.type == "cpu":  # numpy's is vectorised: 2 µs for 50,000 values, where torch takes 25
        at = torch.from_numpy(logits.numpy().argmax(axis=1))
        return logits.gather(1, at[:, None]).squeeze(1), at
    best, at = logits.max(dim=1)
    return best, at


def filter_logits(logits: torch.Tensor, f: Filters) -> None:
    """Put −∞ in place of the logits [n, vocab] that min-p, top-k and top-p do not leave."""
    rows = logits[f.rows]
    scaled = rows / f.temperature
    threshold = scaled.amax(dim=1, keepdim=True) + f.log_min_p
    if f.largest_k:
        parts = zip(*(torch.split(column, max(1, SORTED_AT_ONCE // f.largest_k)) for column in (f.with_k, f.kth)), strict=True)
        kth = torch.cat([scaled[part].topk(f.largest_k, dim=1).values.gather(1, at) for part, at in parts])
        threshold.index_copy_(0, f.with_k, torch.maximum(threshold[f.with_k], kth))
    if f.p_within:
        rows_at_once = max(1, SORTED_AT_ONCE // logits.shape[1])
        parts = zip(torch.split(f.with_p, rows_at_once), torch.split(f.p, rows_at_once), strict=True)
        least = torch.cat([_top_p(scaled[part], threshold[part], p, f.p_within) for part, p in parts])
        threshold.index_copy_(0, f.with_p, torch.maximum(threshold[f.with_p], least))
    logits.index_copy_(0, f.rows, rows.masked_fill_(scaled < threshold, -torch.inf))


def _top_p(scaled: torch.Tensor, threshold: torch.Tensor, p: torch.Tensor, within: int) -> torch.Tensor:
    """The least value in the smallest set of best tokens whose probability reaches p; all shapes [n, 1] but `scaled`.

    Only tokens not below the threshold count, of which the best `within` are looked at, since the others equal the last of them.
    In float64, so that neither order nor number of rows matters.
    """

    def weights(values: torch.Tensor) -> torch.Tensor:
        return (values.double() - most).exp_().masked_fill_(values < threshold, 0.0)

    most = scaled.amax(dim=1, keepdim=True)
    goal = weights(scaled).sum(dim=1, keepdim=True) * p
    best = None
    if within <= _SORTED_FIRST or scaled.device.type == "cpu":
        best = scaled.topk(min(within, _SORTED_FIRST, scaled.shape[1]), dim=1).values
    if best is None or (within > _SORTED_FIRST and bool((weights(best).sum(dim=1, keepdim=True) < goal).any())):
        best = scaled.sort(dim=1, descending=True).values
    chances = weights(best)
    last = (chances.cumsum(dim=1) - chances < goal).sum(dim=1, keepdim=True) - 1
    return best.gather(1, last.clamp_(min=0))


def _draw(scaled: torch.Tensor, draws: _Draws, positions: torch.Tensor) -> torch.Tensor:
    """Tokens (int64 [n]) drawn from logits over temperature [n, vocab], which are used up."""
    rest = -scaled.shape[1] % 4
    if rest:
        scaled = torch.nn.functional.pad(scaled, (0, rest), value=-torch.inf)
    (_add_some_noise if scaled.device.type == "cpu" else _add_noise)(scaled, draws, positions)
    return scaled.argmax(dim=1)


def _add_noise(scaled: torch.Tensor, draws: _Draws, positions: torch.Tensor) -> None:
    fours = scaled.view(len(scaled), -1, 4)
    every = torch.arange(fours.shape[1], device=scaled.device)[None]
    words = philox((draws.low[:, None], draws.high[:, None]), (positions[:, None], every))
    fours += gumbel(torch.stack([word.expand(fours.shape[:2]) for word in words], dim=2))


def _add_some_noise(scaled: torch.Tensor, draws: _Draws, positions: torch.Tensor) -> None:
    """As `_add_noise`, for the tokens that can win: no variate makes up for what lies further below the best."""
    fours = scaled.view(len(scaled), -1, 4)
    scaled.masked_fill_(scaled < scaled.amax(dim=1, keepdim=True) + (GUMBEL_LOW - GUMBEL_HIGH), -torch.inf)
    row, four = (fours.amax(dim=2) > -torch.inf).nonzero(as_tuple=True)
    words = philox((draws.low[row], draws.high[row]), (positions[row], four))
    fours[row, four] += gumbel(torch.stack(words, dim=1))


def _bits(mask: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """bool [n, vocab] of packed int32 words."""
    shifts = torch.arange(32, device=mask.device, dtype=torch.int32)
    return ((mask.unsqueeze(2) >> shifts) & 1).bool().view(len(mask), -1)[:, :vocab_size]
