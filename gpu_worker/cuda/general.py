"""Sampling with all parameters, for steps in which a row needs them: penalties, filters, logprobs, many stop ids.

What `gpu_worker.sampler` does before a draw is enqueued on the card's logits; then the same kernel samples as everywhere
(`kernels/sampler.cu`), from float32 logits: the draws are the CPU worker's. Nothing waits for the card: what is reported beside
tokens and flags travels to pinned memory and is read once the step's event is reached. Steps whose rows need none of this never
come here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpu_worker.cuda.state import MAX_STOP_IDS, DeviceState
from gpu_worker.logit_edits import edits
from gpu_worker.logprobs import Candidates, PromptScores, Reported, columns
from gpu_worker.prompt_scores import asked
from gpu_worker.runner import Outcome, Record, Step
from gpu_worker.sampler import Filters, Sampler
from gpu_worker.stops import StopIds
from gpu_worker.transfer import Arrival, upload
from protocol.columns import Int32
from protocol.messages import STOPPED

if TYPE_CHECKING:
    from gpu_worker.cuda.forward import Forward  # needs triton


def report(step: Step, forward: Forward) -> PromptScores | None:
    """What the rows of a step report of their prompts; the forward pass of all its tokens has been enqueued."""
    reported = asked(step)
    if reported is None:
        return None
    behind, tokens = upload(forward.logits.device, reported.behind, reported.tokens.astype(np.int64))
    return PromptScores(reported, tokens, lambda part: forward.logits_behind(behind[part]))


def needs_general(record: Record) -> bool:
    """Whether the kernel cannot sample for this record."""
    p = record.params
    filters = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
    return filters or p.logprobs >= 0 or bool(p.grammar) or _many_stops(record) or edits(p)


def _many_stops(record: Record) -> bool:
    return len(record.params.stop_ids) // 4 > MAX_STOP_IDS


@dataclass(frozen=True)
class Beside:
    """What a step tells beside the result ring, on its way to the host."""

    arrival: Arrival  # int32 [outputs]: whether a long list of stop ids is hit; then, of the rows reported, as in Told
    reported: Reported | None

    def add_to(self, outcome: Outcome) -> None:
        """Complete an outcome of the ring's tokens and flags. The step's event must have been reached."""
        stopped, *told = self.arrival.read()
        outcome.flags[(outcome.flags == 0) & (stopped != 0)] = STOPPED
        if self.reported is not None:
            lp = columns(self.reported.rows, self.reported.wanted, outcome.tokens, *told)
            outcome.lp_counts, outcome.lp_ids, outcome.lp_values, outcome.lp_ranks = lp.counts, lp.ids, lp.values, lp.ranks


class General:
    """The slots' parameters, and what is enqueued between a forward pass and the next for them."""

    def __init__(self, state: DeviceState, forward: Forward, filter: Callable[[torch.Tensor, Filters], None] | None = None) -> None:
        """filter: the sampler's, see there."""
        g = state.geometry
        self._state, self._forward = state, forward
        self._sampler = Sampler(g.slots, forward.logits_width, state.table.device, filter)
        self._stops = StopIds(g.slots, state.table.device)  # of slots with more than the kernel takes
        self._many_stops = np.zeros(g.slots, dtype=bool)
        self._needed = np.zeros(g.slots, dtype=bool)

    def bind(self, step: Step) -> None:
        """Take the plan's bindings."""
        for slot, record in zip(step.bind_slots.tolist(), step.bind_records, strict=True):
            self._needed[slot] = needs_general(record)
            self._sampler.bind(slot, record)
            if self._many_stops[slot] or _many_stops(record):
                self._stops.bind(slot, record)
            self._many_stops[slot] = _many_stops(record)

    def needed(self, slots: Int32) -> bool:
        """Whether one of these slots needs it."""
        return bool(np.count_nonzero(self._needed[slots]))

    def sample(self, step: Step, stream: int) -> Beside | None:
        """Enqueue the sampling of every output of a step; tokens and flags go to the slots and the result ring."""
        slots, forks = step.output_slots, len(step.fork_slots)
        logits = self._forward.wide_logits(len(slots) - forks)
        if forks:  # each fork edits a row of its own
            rank = np.cumsum(step.outputs > 0) - 1
            rows, own = upload(logits.device, np.concatenate((rank[step.outputs > 0], rank[step.fork_rows])), np.arange(len(slots)))
            logits = logits[rows]
            self._state.outputs[: len(slots), 0].copy_(own)
        found = self._sampler.prepare(logits, slots, step.output_positions)
        self._forward.sample(stream, len(slots), logits)
        many_stops = bool(self._many_stops[slots].any())
        if not many_stops and not self._sampler.wants_tokens(slots):
            return None
        return self._after(slots, found, many_stops)

    def _after(self, slots: Int32, found: Candidates | None, many_stops: bool) -> Beside | None:
        """What needs the sampled tokens; a dead slot's token is an old one, which does no harm."""
        on_card, dead = self._sampler.on_device(slots), self._state.dead
        tokens = self._state.last_token[on_card]
        told = self._sampler.took(slots, tokens.long(), found)
        if not many_stops and told is None:
            return None
        stopped = self._stops.hit(on_card, tokens).int()
        dead.index_copy_(0, on_card, dead[on_card] | stopped)
        return Beside(Arrival(stopped, *(told.tensors if told else ())), self._sampler.reported(slots))
