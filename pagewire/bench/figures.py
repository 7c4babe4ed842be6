"""From records to figures, with the names and definitions of vLLM's `bench serve`.

    TTFT  from sending a request to its first chunk             TPOT  (last chunk − first chunk) / (tokens − 1)
    ITL   between two chunks of one request, all pooled         E2EL  from sending a request to its last chunk
    duration, for all rates: from the first request's start to the last one's end
    goodput: requests per second whose times all keep their objectives; TPOT counts as 0 with one token

A request of one token has no TPOT and counts in no percentile of it. Failed requests count in nothing but `failed`.
Times are milliseconds, tokens the server's own count (`usage`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagewire.bench.exchange import Record

METRICS = ("ttft", "tpot", "itl", "e2el")
OBJECTIVES = ("ttft", "tpot", "e2el")
PERCENTILES = (50.0, 90.0, 99.0)


def figures(
    records: Sequence[Record], objectives: Mapping[str, float] | None = None, percentiles: Sequence[float] = PERCENTILES
) -> dict[str, Any]:
    """All figures of a run. objectives: milliseconds by metric, for goodput."""
    good = [record for record in records if not record.error]
    duration = max((r.last for r in good), default=0.0) - min((r.start for r in records), default=0.0)
    prompt, output = sum(r.prompt_tokens for r in good), sum(r.tokens for r in good)
    rate = 1 / duration if good and duration > 0 else 0.0
    found: dict[str, Any] = {
        "completed": len(good),
        "failed": len(records) - len(good),
        "duration": max(0.0, duration),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "chunks": sum(r.chunks for r in good),
        "request_throughput": len(good) * rate,
        "output_throughput": output * rate,
        "total_token_throughput": (prompt + output) * rate,
    }
    if objectives:
        kept = sum(all(_objective(r, name) <= limit for name, limit in objectives.items()) for r in good)
        found["request_goodput"] = kept * rate
    for name in METRICS:
        found |= _distribution(name, times(good, name), percentiles)
    errors: dict[str, int] = {}
    for record in records:
        if record.error:
            errors[record.error] = errors.get(record.error, 0) + 1
    return found | {"errors": errors}


def times(records: Sequence[Record], metric: str) -> list[float]:
    """A metric's values in milliseconds, of the records that have it."""
    good = [r for r in records if not r.error]
    match metric:
        case "ttft":
            values = [r.first - r.start for r in good]
        case "tpot":
            values = [(r.last - r.first) / (r.tokens - 1) for r in good if r.tokens > 1]
        case "itl":
            values = [gap for r in good for gap in r.gaps]
        case "e2el":
            values = [r.last - r.start for r in good]
        case _:
            raise ValueError(f"{metric!r} is none of {', '.join(METRICS)}")
    return [1000 * value for value in values]


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile by linear interpolation, as numpy's; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _objective(record: Record, metric: str) -> float:
    return next(iter(times([record], metric)), 0.0)


def _distribution(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    mean = sum(values) / len(values) if values else 0.0
    deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5 if values else 0.0
    found = {f"mean_{name}_ms": mean, f"median_{name}_ms": percentile(values, 50), f"std_{name}_ms": deviation}
    return found | {f"p{percent:g}_{name}_ms": percentile(values, percent) for percent in percentiles}
