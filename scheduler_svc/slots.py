"""The columns of a worker's slots, as the scheduler keeps them.

A slot's tokens are counted three times, known ≤ length and computed ≤ length:

    known     tokens whose ids this process has
    length    tokens that exist once every plan in flight is done (known + sampling rows in flight)
    computed  tokens whose K and V exist once every plan in flight is done

A row computes tokens computed … length − 1, and samples the next one if it reaches length.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protocol.messages import Geometry
from scheduler_svc.requests import Choice

Index = npt.NDArray[np.intp]

FREE, PREFILL, DECODE, PLANNED, DRAIN = range(5)
# PREFILL: more than its last token to compute; DECODE: one token a step; PLANNED: its last row is in flight;
# DRAIN: preempted, waiting for its last row


class Slots:
    """Columns of shape [slots], int32; `history` int32 [slots, more than max_model_len]; `table` int32 [slots, width]."""

    def __init__(self, geometry: Geometry, slots: int) -> None:
        self.count = slots
        # one allocation; a row of it is a contiguous column
        columns = np.zeros((13, slots), dtype=np.int32)
        self.state, self.length, self.computed, self.known, self.prompt, self.limit = columns[:6]
        self.blocks, self.capacity, self.generation = columns[6:9]  # entries in the table, tokens they hold
        self.handle, self.index, self.frontend, self.priority = columns[9:]
        self.table = np.zeros((slots, geometry.table_width), dtype=np.int32)
        # zeros are not touched, so the memory is only used as far as sequences reach
        width = geometry.table_width * geometry.block_size + geometry.block_size
        self.history = np.zeros((slots, width), dtype=np.int32)
        self.flat_history = self.history.reshape(-1)
        self.block_history = self.history.reshape(slots, -1, geometry.block_size)
        self.choice: list[Choice | None] = [None] * slots
        self.names: list[list[bytes]] = [[] for _ in range(slots)]  # of the slot's full blocks, in order
        self.free = list(range(slots - 1, -1, -1))


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_size)
