"""What the planner must know of a card's memory beside buffers and weights. Without torch. A worker measures it (`worst_case.py`)."""

from __future__ import annotations

from gpu_worker.prompt_scores import SLICE

KEPT_BACK = 256 << 20  # bytes for graphs, which are captured while a worker serves (48 MiB on an H200), and kernels that are loaded then

# Bytes of a logit:
_KEPT = 5  # how often it was sampled, whether it stood in the prompt
_SAMPLED = 36  # of a row, at most: _KEPT, the logits, as they were before penalties, penalised, and what those are computed by
_SCORED = 22  # of a prompt's position: in float32, in float64, its exponential


def sampling_bytes(rows: int, vocab_size: int) -> int:
    """Bytes that the largest step takes beside its buffers when every row asks for filters, penalties and log probabilities of prompt
    and output."""
    return vocab_size * max(_SAMPLED * rows, _KEPT * rows + _SCORED * SLICE)
