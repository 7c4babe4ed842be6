"""Attention over the paged cache: each new token looks at all tokens of its own sequence up to itself.

A step computes some tokens of several sequences: all of a new prompt, the newest one of a sequence that is running. The
tokens of all sequences lie behind one another in one flat dimension, without padding, so every linear layer works on
the whole batch at once. Only here it matters which token belongs to whom.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from simple_cache import SimpleCache


@dataclass(frozen=True)
class Span:
    """The part of a sequence that a step computes: tokens start … stop − 1."""

    sequence: str
    start: int
    stop: int


class SimpleAttention:
    """Causal attention of a batch. `begin` once a step, then one call for each layer."""

    def __init__(self, cache: SimpleCache, scale: float) -> None:
        """scale: what scores are multiplied by, 1 / √head_dim in most models."""
        self.cache = cache
        self.scale = scale
        self._spans: list[Span] = []

    def begin(self, spans: list[Span]) -> None:
        """Look up the block tables of this step's sequences, which all layers share."""
        self._spans = spans
        self._context = [self.cache.places(span.sequence, 0, span.stop) for span in spans]
        self._new = torch.cat([places[span.start :] for span, places in zip(spans, self._context, strict=True)])

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """queries: [tokens, heads, head_dim]; keys and values: [tokens, kv_heads, head_dim]. Returns [tokens, heads · head_dim].

        All keys and values are written before any is read, so that a prompt's tokens find one another in the cache.
        """
        self.cache.write(layer, self._new, keys, values)
        results, at = [], 0
        for span, places in zip(self._spans, self._context, strict=True):  # on a GPU: one group of threads for each sequence
            count = span.stop - span.start
            results.append(self._one(queries[at : at + count], *self.cache.read(layer, places), span.start))
            at += count
        return torch.cat(results)

    def _one(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
        """One sequence: softmax(Q Kᵀ · scale) V. The first query stands at position `start`, the first key at 0."""
        count, heads, _ = queries.shape
        group = heads // keys.shape[1]  # query heads that share a key head
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * self.scale
        future = torch.arange(keys.shape[0]) > torch.arange(start, start + count)[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values).reshape(count, -1)
