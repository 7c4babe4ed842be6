"""Which sampled tokens end their choice: EOS and stop ids, checked in the worker."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpu_worker.runner import Record
from protocol.columns import Int32, unpack


class StopIds:
    """The stop ids of every slot, in a table as wide as the longest list met."""

    def __init__(self, slots: int) -> None:
        self._table = np.full((slots, 1), -1, np.int32)

    def bind(self, slot: int, record: Record) -> None:
        """A record takes a slot."""
        ids = unpack(record.params.stop_ids)
        if len(ids) > self._table.shape[1]:
            self._table = np.pad(self._table, ((0, 0), (0, len(ids) - self._table.shape[1])), constant_values=-1)
        self._table[slot] = -1
        self._table[slot, : len(ids)] = ids

    def hit(self, slots: Int32, tokens: Int32) -> npt.NDArray[np.bool_]:
        """Whether each token (−1: none) is a stop id of its slot, shape [n]."""
        hit: npt.NDArray[np.bool_] = ((self._table[slots] == tokens[:, None]) & (tokens[:, None] >= 0)).any(axis=1)
        return hit
