"""The part of PromQL that the dashboard uses, evaluated over two scrapes: selectors, rate, increase, sum, max, quantiles, /.

expression = term ("/" term)*
term       = NUMBER | selector | NAME "(" expression, … ")" | AGGREGATION ["by" "(" labels ")"] "(" expression ")"
selector   = METRIC ["{" LABEL op "value", … "}"] ["[" range "]"]        op: = != =~ !~
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Value = float | Vector

TOKEN = re.compile(r'\s*(?:(\d+\.?\d*)|([a-zA-Z_:][\w:]*)|("[^"]*")|(\[[^\]]*\])|(=~|!~|!=|[(){},=/]))')
AGGREGATIONS: dict[str, Callable[[list[float]], float]] = {"sum": sum, "max": max}


@dataclass(frozen=True)
class Scrape:
    """What /metrics said at a time, by sample name."""

    at: float
    samples: dict[str, Vector]

    @staticmethod
    def of(text: str, at: float) -> Scrape:
        samples: dict[str, Vector] = defaultdict(dict)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name][frozenset(sample.labels.items())] = sample.value
        return Scrape(at, dict(samples))


class Query:
    """One expression. Raises ValueError for what is not understood, and for a metric that was not scraped."""

    def __init__(self, text: str) -> None:
        self._tokens = []
        at = 0
        while text[at:].strip():
            match = TOKEN.match(text, at)
            if match is None:
                raise ValueError(f"not understood: {text[at:]!r}")
            self._tokens.append(match.group().strip())
            at = match.end()

    def evaluate(self, before: Scrape, now: Scrape) -> Value:
        self._at, self._before, self._now = 0, before, now
        value = self._expression()
        if self._at != len(self._tokens):
            raise ValueError(f"left over: {self._tokens[self._at :]}")
        return value

    def _next(self, wanted: str = "") -> str:
        token = self._tokens[self._at]
        if wanted and token != wanted:
            raise ValueError(f"{wanted!r} expected, not {token!r}")
        self._at += 1
        return token

    def _is(self, token: str) -> bool:
        return self._at < len(self._tokens) and self._tokens[self._at] == token

    def _expression(self) -> Value:
        value = self._term()
        while self._is("/"):
            self._next()
            value = divide(value, self._term())
        return value

    def _term(self) -> Value:
        token = self._next()
        if token[0].isdigit():
            return float(token)
        if token in AGGREGATIONS:
            return self._aggregation(AGGREGATIONS[token])
        if token in ("rate", "increase"):
            self._next("(")
            increase, seconds = self._selector(self._next(), ranged=True), self._now.at - self._before.at
            self._next(")")
            return {labels: value / seconds if token == "rate" else value for labels, value in increase.items()}
        if token == "histogram_quantile":
            self._next("(")
            quantile = self._expression()
            self._next(",")
            buckets = self._expression()
            self._next(")")
            assert isinstance(quantile, float)
            assert isinstance(buckets, dict)
            return histogram_quantile(quantile, buckets)
        return self._selector(token, ranged=False)

    def _aggregation(self, how: Callable[[list[float]], float]) -> Vector:
        kept: set[str] = set()
        if self._is("by"):
            self._next()
            self._next("(")
            while not self._is(")"):
                kept.add(self._next())
                if self._is(","):
                    self._next()
            self._next(")")
        self._next("(")
        value = self._expression()
        self._next(")")
        assert isinstance(value, dict)
        groups: dict[Labels, list[float]] = defaultdict(list)
        for labels, number in value.items():
            groups[frozenset(pair for pair in labels if pair[0] in kept)].append(number)
        return {labels: how(numbers) for labels, numbers in groups.items()}

    def _selector(self, name: str, ranged: bool) -> Vector:
        tests: list[tuple[str, str, str]] = []
        if self._is("{"):
            self._next()
            while not self._is("}"):
                tests.append((self._next(), self._next(), self._next().strip('"')))
                if self._is(","):
                    self._next()
            self._next()
        if self._is_range() != ranged:
            raise ValueError(f"{name}: a range is needed for rate and increase, and only there")
        if ranged:
            self._next()
        if name not in self._now.samples:
            raise ValueError(f"no sample is called {name}")
        found = {labels: value for labels, value in self._now.samples[name].items() if all(holds(labels, *test) for test in tests)}
        if not ranged:
            return found
        before = self._before.samples.get(name, {})
        return {labels: value - before[labels] for labels, value in found.items() if labels in before}

    def _is_range(self) -> bool:
        return self._at < len(self._tokens) and self._tokens[self._at].startswith("[")


def holds(labels: Labels, name: str, op: str, value: str) -> bool:
    """Whether a label fits a matcher. Raises ValueError for a label that the sample has not."""
    if name not in dict(labels):
        raise ValueError(f"no label {name} in {dict(labels)}")
    own = dict(labels)[name]
    fits = own == value if op in ("=", "!=") else re.fullmatch(value, own) is not None
    return fits != op.startswith("!")


def divide(a: Value, b: Value) -> Value:
    """Sample by sample of equal labels."""
    assert isinstance(a, dict)
    assert isinstance(b, dict)
    return {labels: value / b[labels] if b[labels] else math.nan for labels, value in a.items() if labels in b}


def histogram_quantile(quantile: float, buckets: Vector) -> Vector:
    """The quantile of each group of cumulative buckets, linear within a bucket; NaN of an empty one."""
    groups: dict[Labels, list[tuple[float, float]]] = defaultdict(list)
    for labels, count in buckets.items():
        groups[frozenset(pair for pair in labels if pair[0] != "le")].append((float(dict(labels)["le"]), count))
    found = {}
    for labels, group in groups.items():
        group.sort()
        wanted, low, below = quantile * group[-1][1], 0.0, 0.0
        found[labels] = math.nan
        for bound, count in group if group[-1][1] else ():
            if count >= wanted:
                found[labels] = low if bound == math.inf else low + (bound - low) * (wanted - below) / (count - below)
                break
            low, below = bound, count
    return found
