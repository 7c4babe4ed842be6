"""What a request changes about its logits before they are sampled: penalties, bias, allowed, banned and stop ids.

Everything is batched. What a row's parameters are is spread out into index columns when the set of rows changes, so that a
steady step has a few tensor operations and no loop over rows, and rows that edit nothing cost nothing. Nothing here waits for
the device: who needs what is decided from the parameters on the host, never from values on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.runner import Record
from gpu_worker.transfer import upload
from protocol.columns import Int32, unpack, unpack_floats
from protocol.messages import SamplingParams


def edits(params: SamplingParams) -> bool:
    """Whether these parameters change logits at all."""
    return bool(penalises(params) or params.bias_ids or params.allowed_ids or params.bad_words or (params.min_tokens and params.stop_ids))


def penalises(params: SamplingParams) -> bool:
    """Whether these parameters need token counts."""
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


@dataclass
class _Columns:
    """The parameters of the rows of one step, spread out; `*_row` is an index into the rows of the logits."""

    slots: torch.Tensor  # int64 [n]
    bias_row: torch.Tensor
    bias_id: torch.Tensor
    bias_value: torch.Tensor
    allowed_row: torch.Tensor
    allowed_id: torch.Tensor
    restricted: torch.Tensor  # rows with a list of allowed ids
    stop_row: npt.NDArray[np.int64]  # stop ids of rows with min_tokens
    stop_id: npt.NDArray[np.int64]
    min_end: npt.NDArray[np.int64]  # per row: the first position where a stop id may stand
    word_row: torch.Tensor
    word_prefix: torch.Tensor  # [words, length]: what must precede, −1 for nothing
    word_last: torch.Tensor
    penal_row: torch.Tensor
    penal_slot: torch.Tensor  # row in the counts
    one: torch.Tensor  # int32 [penal]
    presence: torch.Tensor  # [penal, 1]
    frequency: torch.Tensor
    repetition: torch.Tensor


class LogitEdits:
    """The slots' editing parameters, the token counts that penalties need, and the last tokens that banned words need."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._records: list[Record | None] = [None] * slots
        self._active = np.zeros(slots, dtype=bool)
        self._counted: dict[int, int] = {}  # slot → row of the counts
        self._free_rows: list[int] = []
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # sampled tokens
        self._prompted = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._recent = torch.full((slots, 0), -1, dtype=torch.int64, device=device)  # as wide as the longest word yet, below MAX_WORD
        self._columns: _Columns | None = None
        self._columns_of: bytes = b""

    def bind(self, slot: int, record: Record) -> None:
        """A record takes a slot; its history, tokens sampled before included, counts from the start."""
        row = self._counted.pop(slot, None)
        if row is not None:
            self._free_rows.append(row)
        self._columns = None
        self._active[slot] = edits(record.params)
        if not self._active[slot]:
            self._records[slot] = None
            return
        self._records[slot] = record
        if penalises(record.params):
            self._count(slot, record)
        if record.params.bad_words:
            self._remember(slot, record)

    def apply(self, logits: torch.Tensor, slots: Int32, positions: Int32) -> None:
        """Edit logits [n, vocab] in place; slots and positions [n] say whose they are and where the token will stand."""
        if not self._active[slots].any():
            return
        c = self._spread(slots)
        if len(c.penal_row):
            self._penalise(logits, c)
        if len(c.bias_row):
            logits.index_put_((c.bias_row, c.bias_id), c.bias_value, accumulate=True)
        if len(c.restricted):
            kept = logits[c.allowed_row, c.allowed_id]
            logits.index_fill_(0, c.restricted, -torch.inf).index_put_((c.allowed_row, c.allowed_id), kept)
        if len(c.word_row):
            recent = self._recent[c.slots[c.word_row], self._recent.shape[1] - c.word_prefix.shape[1] :]
            hit = ((recent == c.word_prefix) | (c.word_prefix < 0)).all(dim=1)
            # added, so that two words of a row that end alike do not undo one another
            banned = torch.zeros_like(hit, dtype=logits.dtype).masked_fill_(hit, -torch.inf)
            logits.index_put_((c.word_row, c.word_last), banned, accumulate=True)
        early = positions[c.stop_row] < c.min_end[c.stop_row]
        if early.any():
            row, id = upload(self._device, c.stop_row[early], c.stop_id[early])
            logits.index_put_((row, id), logits.new_full((len(row),), -torch.inf))

    def counts(self, slots: Int32) -> bool:
        """Whether `took` does anything for these slots."""
        return bool(self._active[slots].any()) and bool(self._counted or self._recent.shape[1])

    def took(self, slots: Int32, tokens: torch.Tensor) -> None:
        """Tokens (int64 [n], 0 or more) were sampled for these slots. What a dead slot is given does not matter."""
        if not self.counts(slots):
            return
        c = self._spread(slots)
        if len(c.penal_row):
            self._counts.view(-1).index_add_(0, c.penal_slot * self._vocab_size + tokens[c.penal_row], c.one)
        if self._recent.shape[1]:
            self._recent.index_copy_(0, c.slots, torch.cat((self._recent[c.slots, 1:], tokens[:, None]), dim=1))

    def _penalise(self, logits: torch.Tensor, c: _Columns) -> None:
        counts = self._counts[c.penal_slot]
        rows = logits[c.penal_row]
        seen = self._prompted[c.penal_slot] | (counts > 0)
        rows = torch.where(seen, torch.where(rows > 0, rows / c.repetition, rows * c.repetition), rows)
        rows -= c.frequency * counts
        rows -= c.presence * (counts > 0)
        logits.index_copy_(0, c.penal_row, rows)

    def _count(self, slot: int, record: Record) -> None:
        if not self._free_rows:
            have, more = len(self._counts), max(8, len(self._counts))
            self._counts = torch.cat((self._counts, self._counts.new_zeros((more, self._vocab_size))))
            self._prompted = torch.cat((self._prompted, self._prompted.new_zeros((more, self._vocab_size))))
            self._free_rows.extend(range(have, have + more))
        row = self._counted[slot] = self._free_rows.pop()
        prompt, sampled = record.history[: record.prompt_length], record.history[record.prompt_length : record.length]
        ids, counts = np.unique(sampled, return_counts=True)
        prompt_ids, sampled_ids, times = upload(self._device, prompt.astype(np.int64), ids.astype(np.int64), counts.astype(np.int32))
        self._counts[row].zero_().index_copy_(0, sampled_ids, times)
        self._prompted[row].zero_().index_fill_(0, prompt_ids, True)

    def _remember(self, slot: int, record: Record) -> None:
        longest = max(len(word) // 4 for word in record.params.bad_words) - 1
        missing = longest - self._recent.shape[1]
        if missing > 0:
            self._recent = torch.nn.functional.pad(self._recent, (missing, 0), value=-1)
        width = self._recent.shape[1]
        tail = np.full(width, -1, np.int64)
        known = record.history[max(0, record.length - width) : record.length]
        tail[width - len(known) :] = known
        self._recent[slot] = upload(self._device, tail)[0]

    def _spread(self, slots: Int32) -> _Columns:
        key = slots.tobytes()
        if self._columns is None or key != self._columns_of:
            self._columns, self._columns_of = self._spread_anew(slots), key
        return self._columns

    def _spread_anew(self, slots: Int32) -> _Columns:
        rows = [(i, self._records[slot], slot) for i, slot in enumerate(slots.tolist()) if self._active[slot]]
        active = [(i, record.params, record, slot) for i, record, slot in rows if record is not None]

        def flat(columns: list[tuple[int, bytes]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
            ids = [unpack(column) for _, column in columns]
            row = np.repeat([i for i, _ in columns], [len(c) for c in ids]).astype(np.int64)
            return row, np.concatenate([np.zeros(0, np.int64), *ids]).astype(np.int64)

        bias_row, bias_id = flat([(i, p.bias_ids) for i, p, _, _ in active])
        values = np.concatenate([np.zeros(0, np.float32), *(unpack_floats(p.bias_values) for _, p, _, _ in active)])
        allowed_row, allowed_id = flat([(i, p.allowed_ids) for i, p, _, _ in active])
        stop_row, stop_id = flat([(i, p.stop_ids) for i, p, _, _ in active if p.min_tokens])
        min_end = np.zeros(len(slots), np.int64)
        for i, p, record, _ in active:
            min_end[i] = record.prompt_length + p.min_tokens
        words = [(i, unpack(word)) for i, p, _, _ in active for word in p.bad_words if word]
        length = max((len(word) for _, word in words), default=1) - 1
        prefix = np.full((len(words), length), -1, np.int64)
        for w, (_, word) in enumerate(words):
            prefix[w, length - len(word) + 1 :] = word[:-1]
        penal = [(i, self._counted[slot], p) for i, p, _, slot in active if slot in self._counted]

        def index(values: object) -> npt.NDArray[np.int64]:
            return np.array(values, np.int64)

        def per_penal(values: list[float]) -> npt.NDArray[np.float32]:
            return np.array(values, np.float32)[:, None]

        spread = {
            "slots": index(slots),
            "bias_row": bias_row,
            "bias_id": bias_id,
            "bias_value": values,
            "allowed_row": allowed_row,
            "allowed_id": allowed_id,
            "restricted": index([i for i, p, _, _ in active if p.allowed_ids]),
            "word_row": index([i for i, _ in words]),
            "word_prefix": prefix,
            "word_last": index([word[-1] for _, word in words]),
            "penal_row": index([i for i, _, _ in penal]),
            "penal_slot": index([row for _, row, _ in penal]),
            "one": np.ones(len(penal), np.int32),
            "presence": per_penal([p.presence_penalty for _, _, p in penal]),
            "frequency": per_penal([p.frequency_penalty for _, _, p in penal]),
            "repetition": per_penal([p.repetition_penalty for _, _, p in penal]),
        }
        there = dict(zip(spread, upload(self._device, *spread.values()), strict=True))
        return _Columns(**there, stop_row=stop_row, stop_id=stop_id, min_end=min_end)
