"""The memory that filtering logits takes on a card. Without torch, since the planner counts it too."""

SORTED_AT_ONCE = 1 << 23  # logits that top-p sorts at a time
_SORTED = 64  # bytes a logit while it is sorted: float64 weights and sums, values, places
_FILTERED = 16  # bytes a logit of all rows: in float32, as taken, over temperature, and their copies


def filter_bytes(rows: int, vocab_size: int, sorts: bool = True) -> int:
    """Bytes of temporaries when every row is filtered. sorts: by torch's sort, not by `kernels/filter.cu`."""
    logits = rows * vocab_size
    return _FILTERED * logits + (_SORTED * min(logits, SORTED_AT_ONCE) if sorts else 0)
