"""How many blocks a card has room for: what is left once the step that takes most memory has been run and measured.

Formulas knew the buffers; they did not know what cuBLAS, torch's temporaries, its allocator's gaps and the kernels' own code take. So a
runner on a card is built with a cache of a single block, runs `worst_step` once, and only then makes the cache it will serve from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.errors import LoadError
from gpu_worker.prompt_scores import SLICE
from gpu_worker.runner import Record, Step
from protocol.columns import EMPTY, pack, pack_floats
from protocol.messages import Geometry, Plan, SamplingParams

_STOP_IDS = 64  # more than a kernel takes
_ALTERNATIVES = 20  # as many as a request may ask for

log = logging.getLogger("worker")


@dataclass(frozen=True)
class Usage:
    """Bytes of a card, after the step that takes most."""

    total: int
    free: int
    reserved: int  # by torch's allocator
    peak: int  # most that it had reserved meanwhile

    @property
    def outside(self) -> int:
        """In use beside the allocator: the context, kernels, other processes."""
        return self.total - self.free - self.reserved

    def left(self, share: float = 1.0) -> int:
        """What `share` of the card holds beside such a step and what lies outside the allocator."""
        return int(share * self.total) - self.outside - self.peak


def worst_step(geometry: Geometry, long: bool = False) -> Step:
    """A prefill of the most tokens for the most sequences, which ask for all that a request can: filters, penalties, bias, bad words,
    many stop ids, log probabilities of prompt and output. All write to block 0. Lists of ids as long as the vocabulary are left out.

    long: the first row's tokens are the last that a sequence can have, for attention that takes more memory the more there is before them;
    it goes through a step row by row, and with all rows as long a step would take minutes.
    """
    g, rows = geometry, min(geometry.slots, geometry.max_step_tokens)
    slots = np.arange(rows, dtype=np.int32)
    counts = np.minimum((g.max_step_tokens - slots - 1) // rows + 1, g.max_model_len).astype(np.int32)
    params = SamplingParams(
        max_tokens=1,
        top_p=0.9,
        top_k=max(1, g.vocab_size - 1),
        min_p=1e-6,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        repetition_penalty=1.1,
        min_tokens=1,
        stop_ids=pack(range(min(_STOP_IDS, g.vocab_size // 2))),
        logprobs=_ALTERNATIVES,
        prompt_logprobs=_ALTERNATIVES,
        bias_ids=pack([0]),
        bias_values=pack_floats([0.1]),
        bad_words=[pack([0, 0])],
    )
    ends = counts.copy()
    if long:
        ends[0] = g.max_model_len
    starts = ends - counts
    records = [
        Record(slot, np.zeros(end, np.int32), EMPTY, slot, params, g.max_model_len)
        for slot, end in zip(slots.tolist(), ends.tolist(), strict=True)
    ]
    scored = counts - 1  # what predicts a row's first token is not computed
    reporting = (scored > 0) & (np.cumsum(scored) - scored < SLICE)  # more take time, not memory
    blocks = -(-ends // g.block_size)
    indices = np.concatenate([np.arange(n, dtype=np.int32) for n in blocks.tolist()])
    plan = Plan(
        step=0,
        bind_slots=pack(slots),
        assign_slots=pack(np.repeat(slots, blocks)),
        assign_indices=pack(indices),
        assign_blocks=pack(np.zeros_like(indices)),
    )
    return Step(
        plan=plan,
        records=records,
        slots=slots,
        starts=starts,
        counts=counts,
        outputs=np.ones(rows, np.int32),
        known=counts,
        prefill=np.zeros(int(counts.sum()), np.int32),
        fork_rows=EMPTY,
        fork_slots=EMPTY,
        fork_records=[],
        bind_slots=slots,
        bind_records=records,
        scores=np.where(reporting, starts + 1, 0).astype(np.int32),
    )


def measure(run: Callable[[], object]) -> Usage:
    """What the current card holds after `run`, and at most meanwhile; what the allocator keeps for reuse is given back before and after."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    usage = Usage(total, free, torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved())
    torch.cuda.empty_cache()
    return usage


def blocks_that_fit(usage: Usage, share: float, block: int, needed: int, asked: int = 0, kept: int = 0) -> int:
    """Blocks for a cache under `share` of the card, or as many as are asked for (0: as many as fit).

    block: bytes of one. needed: blocks of one sequence of max_model_len. kept: bytes for what comes later.
    Raises LoadError, one line, if a sequence has no room, or the card none for what is asked for.
    """
    left = usage.left(share) - kept
    fit = max(0, left // block)
    told = usage.peak >> 20, usage.outside >> 20, left >> 20, share
    log.info("weights and the largest step take %d MiB, %d MiB lie outside the allocator, %d MiB are left under a share of %g", *told)
    if asked:
        if asked < needed:
            raise LoadError(
                f"{asked} blocks hold no sequence of max_model_len, which needs {needed}: lower --max-model-len or raise --num-gpu-blocks"
            )
        if asked * block > usage.left():
            raise LoadError(
                f"not enough memory on the card: {asked} blocks of {block >> 10} KiB are asked for, beside weights and the largest step "
                f"{max(0, usage.left() // block)} fit; lower --num-gpu-blocks, or leave it out"
            )
        if asked > fit:
            log.warning("%d blocks are more than the %d that fit under --gpu-memory-utilization %g", asked, fit, share)
        return asked
    if fit < needed:
        raise LoadError(
            f"not enough memory on the card: beside weights and the largest step {max(0, left) >> 20} MiB are left under "
            f"--gpu-memory-utilization {share:g}, {needed} blocks of {block >> 10} KiB are needed for one sequence; lower "
            "--max-model-len, --max-num-batched-tokens or --max-num-seqs, or raise --gpu-memory-utilization"
        )
    return fit
