"""Sampling with all parameters, for steps in which a row needs them: penalties, filters, logprobs, many stop ids.

It is `gpu_worker.sampler` on the card's logits, which waits for the card once a step; steps whose rows need none of this
never come here (`kernels/sampler.cu`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from gpu_worker.cuda.state import MAX_STOP_IDS, DeviceState
from gpu_worker.logit_edits import edits
from gpu_worker.logprobs import prompt_scores
from gpu_worker.prompt_scores import asked
from gpu_worker.runner import Outcome, Record, RowScores, Step
from gpu_worker.sampler import Sampler
from gpu_worker.stops import StopIds
from protocol.columns import Int32
from protocol.messages import DEAD, NAN, STOPPED

if TYPE_CHECKING:
    from gpu_worker.cuda.forward import Forward  # needs triton


def report(step: Step, forward: Forward) -> list[RowScores]:
    """What the rows of a step report of their prompts; the forward pass of all its tokens has been enqueued."""
    reported = asked(step)
    return [] if reported is None else prompt_scores(reported, lambda part: forward.logits_behind(reported.behind[part]))


def needs_general(record: Record) -> bool:
    """Whether the kernel cannot sample for this record."""
    p = record.params
    filters = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
    return filters or p.logprobs >= 0 or bool(p.grammar) or len(p.stop_ids) // 4 > MAX_STOP_IDS or edits(p)


class General:
    """The slots' parameters on the host's side."""

    def __init__(self, state: DeviceState) -> None:
        g = state.geometry
        self._state = state
        self._sampler = Sampler(g.slots, g.vocab_size, state.table.device)
        self._stops = StopIds(g.slots)
        self._needed = np.zeros(g.slots, dtype=bool)

    def bind(self, step: Step) -> None:
        """Take the plan's bindings."""
        for slot, record in zip(step.bind_slots.tolist(), step.bind_records, strict=True):
            self._needed[slot] = needs_general(record)
            self._sampler.bind(slot, record)
            self._stops.bind(slot, record)

    def needed(self, slots: Int32) -> bool:
        """Whether one of these slots needs it."""
        return bool(self._needed[slots].any())

    def sample(self, step: Step, logits: torch.Tensor) -> Outcome:
        """Sample every output of a step; logits [rows that sample, vocab]. Leaves tokens and flags in the slots."""
        slots, state = step.output_slots, self._state
        rank = np.cumsum(step.outputs > 0) - 1
        rows = rank[np.concatenate((np.flatnonzero(step.outputs), step.fork_rows))]
        on_card = torch.from_numpy(slots.astype(np.int64)).to(logits.device)
        live = (state.dead[on_card] == 0).cpu().numpy()
        taken = logits[torch.from_numpy(rows.astype(np.int64)).to(logits.device)].float()
        sampled = self._sampler.sample(taken, slots, step.output_positions, live)
        tokens = sampled.tokens
        stopped = self._stops.hit(slots, tokens)
        flags = np.where(live, np.where(tokens < 0, NAN, np.where(stopped, STOPPED, 0)), DEAD).astype(np.uint8)
        state.last_token[on_card] = torch.from_numpy(np.maximum(tokens, 0)).to(logits.device)
        state.dead[on_card] = torch.from_numpy((flags != 0).astype(np.int32)).to(logits.device)
        lp = sampled.logprobs
        return Outcome(tokens=tokens, flags=flags, lp_counts=lp.counts, lp_ids=lp.ids, lp_values=lp.values, lp_ranks=lp.ranks)
