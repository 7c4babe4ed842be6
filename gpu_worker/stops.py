"""Which sampled tokens end their choice: EOS and stop ids, checked in the worker. What sampling leaves in the slots."""

from __future__ import annotations

import torch

from gpu_worker.runner import Record
from gpu_worker.transfer import upload
from protocol.columns import unpack
from protocol.messages import DEAD, NAN, STOPPED


class StopIds:
    """The stop ids of every slot, in a table on the device as wide as the longest list met."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._table = torch.full((slots, 1), -1, dtype=torch.int32, device=device)

    def bind(self, slot: int, record: Record) -> None:
        """A record takes a slot."""
        ids = unpack(record.params.stop_ids)
        missing = len(ids) - self._table.shape[1]
        if missing > 0:
            self._table = torch.nn.functional.pad(self._table, (0, missing), value=-1)
        row = self._table[slot]
        row.fill_(-1)
        if len(ids):
            row[: len(ids)] = upload(row.device, ids)[0]

    def hit(self, slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Whether each token (shape [n]; −1 hits where a list has room left) is a stop id of its slot, bool [n]."""
        return (self._table[slots] == tokens[:, None]).any(dim=1)


class SlotEnds:
    """Last token and death of every slot. `last_token`, `dead`: int32 [slots] on the device, changed in place."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.last_token = torch.zeros(slots, dtype=torch.int32, device=device)
        self.dead = torch.zeros(slots, dtype=torch.int32, device=device)
        self._stops = StopIds(slots, device)

    def bind(self, slot: int, record: Record) -> None:
        """A record takes a slot, which lives again."""
        self.dead[slot] = 0
        self._stops.bind(slot, record)

    def settle(self, slots: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave sampled tokens (−1: the logits gave none) in their slots; both int64 [n].

        Returns the tokens as they are reported, −1 of dead slots too, and the flags of protocol.messages; both int32 [n].
        """
        tokens = tokens.int()
        dead = self.dead[slots] != 0
        flags = self._stops.hit(slots, tokens).int() * STOPPED
        flags.masked_fill_(tokens < 0, NAN).masked_fill_(dead, DEAD)
        self.last_token.index_copy_(0, slots, tokens.clamp(min=0))
        self.dead.index_copy_(0, slots, flags)
        return tokens.masked_fill(dead, -1), flags
