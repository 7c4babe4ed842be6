"""The packed columns of TOKENS and PROMPT_SCORES, as rows of tokens and log probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from frontend.entries import TokenLogprobs
from protocol.columns import unpack, unpack_floats
from protocol.messages import Scores, Tokens

Row = tuple[int, int, int, list[int], Sequence[TokenLogprobs]]


def rows(message: Tokens) -> Iterator[Row]:
    """(handle, choice, index of the first token, ids, log probabilities: one for each id or none at all) of each row."""
    ids = unpack(message.ids).tolist()
    counts = unpack(message.counts).tolist()
    end = 0
    for handle, choice, first, count, logprobs in zip(
        unpack(message.handles).tolist(),
        unpack(message.choices).tolist(),
        unpack(message.firsts).tolist(),
        counts,
        _logprobs(message, counts) if message.lp_counts else [()] * len(counts),
        strict=True,
    ):
        start, end = end, end + count
        yield handle, choice, first, ids[start:end], logprobs


def _logprobs(message: Tokens, counts: list[int]) -> Iterator[list[TokenLogprobs]]:
    ids, values = unpack(message.lp_ids).tolist(), unpack_floats(message.lp_values).tolist()
    ranks = iter(unpack(message.lp_ranks).tolist())
    end = 0
    for pairs, count in zip(unpack(message.lp_counts).tolist(), counts, strict=True):
        row = []
        for _ in range(count if pairs else 0):
            start, end = end, end + pairs
            row.append(TokenLogprobs(ids[start:end], values[start:end], next(ranks)))
        yield row


def prompt_logprobs(scores: Scores) -> list[TokenLogprobs]:
    """The log probabilities of each position that `scores` tells."""
    ids, values = unpack(scores.ids).tolist(), unpack_floats(scores.values).tolist()
    pairs = len(ids) // scores.count
    spans = (slice(at, at + pairs) for at in range(0, len(ids), pairs))
    return [TokenLogprobs(ids[span], values[span], rank) for span, rank in zip(spans, unpack(scores.ranks).tolist(), strict=True)]
