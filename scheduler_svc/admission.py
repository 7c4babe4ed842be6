"""Whether a waiting choice may join: not by its prompt alone, but by the peak of KV blocks that is to be expected."""

from __future__ import annotations

import numpy as np

from scheduler_svc.requests import Choice
from scheduler_svc.slots import DECODE, PLANNED, PREFILL, blocks_for
from scheduler_svc.worker import Worker

BEYOND = 64  # tokens still expected of a sequence that is longer than predicted


def fits(worker: Worker, choice: Choice, blocks: int) -> bool:
    """Whether `choice` may join the running sequences, if it takes `blocks` further blocks for its tokens so far.

    Blocks that running prefills will still need are spoken for. Beyond them, the expected peak must fit: when the
    sequence with the i-th most tokens to go ends, i sequences hold what they have now plus that many tokens each, and
    all others have ended (the estimate of LightLLM's scheduler). An output is expected to be as long as nine in ten
    recent ones of the model, or its max_tokens if that is less. Wrong guesses cost a preemption, never correctness.
    """
    s, size = worker.slots, worker.block_size
    reserved = sum(-(-int(s.length[slot]) // size) - int(s.blocks[slot]) for slot in worker.prefilling)
    if blocks + reserved > worker.blocks.available:
        return False
    request = choice.request
    forks = not choice.scores and not len(choice.tokens)
    siblings = sum(c.queue is worker.queue and not len(c.tokens) for c in request.choices) if forks else 1
    if not worker.running or worker.promised + siblings * blocks_for(choice.limit, size) <= worker.blocks.count:
        return True  # even if everyone grows to the limit at once
    busy = np.flatnonzero((s.state == PREFILL) | (s.state == DECODE) | (s.state == PLANNED))
    if not len(busy):
        return True
    length = s.length[busy]
    expected = worker.model.outputs.expected
    ends = s.prompt[busy] + expected
    left = np.minimum(s.limit[busy], np.where(ends > length, ends, length + BEYOND)) - length
    end = len(request.prompt) + expected
    own = min(choice.limit, end if end > choice.length else choice.length + BEYOND) - choice.length
    have = np.concatenate((length, [blocks * size - (-choice.length % size)] + [0] * (siblings - 1)))
    left = np.concatenate((left, [own] * siblings))
    order = np.argsort(-left, kind="stable")
    peak = int((np.cumsum(have[order] + size // 2) + left[order] * np.arange(1, len(order) + 1)).max())
    shared = int(s.blocks.sum()) - worker.blocks.used  # counted once per table above, but there once
    return peak <= (worker.blocks.count + max(shared, 0)) * size
