"""Samples of metric families on their way from a service to the admin server, and histograms that are cheap to fill."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

from protocol.families import FAMILIES


class Series(msgspec.Struct, array_like=True, frozen=True):
    """One label combination of a family (`protocol/families.py`) since the service's start.

    `value` is a histogram's sum; `counts` its observations by bucket, not cumulated, the last above all bounds.
    """

    family: str
    labels: list[str]  # values, in the family's order, without the service's name
    value: float
    counts: list[int] = []


class Histogram:
    """Counts of one family's buckets."""

    __slots__ = ("_bounds", "_family", "counts", "sum")

    def __init__(self, family: str) -> None:
        self._family = family
        self._bounds = FAMILIES[family].bounds
        self.counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count an observation, or several equal ones."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def series(self, labels: list[str], family: str = "") -> Series:
        """Where it stands now, under the name of another family of the same buckets if that is given."""
        return Series(family or self._family, labels, self.sum, list(self.counts))
