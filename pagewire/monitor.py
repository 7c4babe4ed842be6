"""The performance monitor: what the stack did in the last minute, and since it started, from what the services publish."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

import msgspec

from pagewire.metrics import FORGET
from protocol.telemetry import Telemetry

WINDOW = 60.0  # seconds that `figures` looks back
APART = 0.5  # seconds between samples that are kept, but for the last
COUNTED = {  # by role, what is added up over incarnations
    "frontend": (
        *("requests_finished", "requests_failed", "requests_aborted", "generation_tokens", "prompt_tokens", "request_seconds"),
        *("first_token_seconds", "first_token_requests", "later_token_seconds", "later_tokens"),
    ),
    "scheduler": ("prefix_queries", "prefix_hits", "preemptions"),
    "worker": ("worker_tokens", "worker_seconds", "worker_step_seconds", "worker_idle_seconds", "worker_steps"),
}


class Sums(msgspec.Struct):
    """Where a monitor stands: what another one goes on from. Times are those of the host's monotonic clock."""

    began: float
    at: float
    totals: dict[str, float]
    seen: dict[str, tuple[int, dict[str, float]]]  # by name: incarnation, counters


class Monitor:
    """Adds up counters of all services, whoever dies meanwhile; goes on from `before`, if there is such.

    `began_before(telemetry)`: whether a service that is heard for the first time had worked before this monitor's time,
    which is not counted then.
    """

    def __init__(self, now: float, began_before: Callable[[Telemetry], bool] = lambda telemetry: False, before: Sums | None = None) -> None:
        sums = before or Sums(now, now, {}, {})
        self._began = sums.began
        self._began_before = began_before
        self._seen = sums.seen
        self._totals: Counter[str] = Counter(sums.totals)  # of floats
        self._samples: deque[tuple[float, Counter[str]]] = deque([(sums.at, Counter(self._totals))])
        self._gauges: dict[str, tuple[float, dict[str, float]]] = {}  # by scheduler, with the time of the last sample before

    def take(self, telemetry: Telemetry) -> None:
        """Count what a service did since its last message."""
        name, values = telemetry.name, telemetry.values
        incarnation, before = self._seen.get(name, (0, {}))
        if incarnation != telemetry.incarnation:
            before = values if not incarnation and self._began_before(telemetry) else {}
        for key in COUNTED.get(telemetry.role, ()):
            self._totals[key] += values.get(key, 0.0) - before.get(key, 0.0)  # type: ignore[assignment]  # of floats
        if telemetry.role == "scheduler":
            self._gauges[name] = self._samples[-1][0], {key: values.get(key, 0.0) for key in ("blocks", "blocks_used")}
        self._seen[name] = (telemetry.incarnation, values)

    def sample(self, now: float) -> None:
        """Note where the counters stand; called about once a second, and whenever somebody reads.

        Replaces the last note if it is not `APART` from the one before it, so that readers add little to what is kept.
        """
        if len(self._samples) > 1 and self._samples[-1][0] - self._samples[-2][0] < APART:
            self._samples.pop()
        self._samples.append((now, Counter(self._totals)))
        while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW:
            self._samples.popleft()
        self._gauges = {name: gauges for name, gauges in self._gauges.items() if now - gauges[0] < FORGET}

    def figures(self, window: float = WINDOW) -> dict[str, float]:
        """The last `window` seconds: tokens per second, seconds, shares of 1. 0 stands for what did not happen.

        throughput: tokens sampled per second; latency: mean seconds of the requests that finished; gpu_utilization:
        share of the workers' time in which their device computed; memory_usage: share of the KV blocks in use, now;
        cache_hit_rate: share of the prompt tokens looked up that were found.
        """
        end, last = self._samples[-1]
        begin, first = next(((at, counts) for at, counts in self._samples if at >= end - window), self._samples[-1])
        did = Counter(last)
        did.subtract(first)
        blocks, used = (sum(gauges[key] for _, gauges in self._gauges.values()) for key in ("blocks", "blocks_used"))
        return {
            "throughput": _share(did["worker_tokens"], end - begin),
            "latency": _share(did["request_seconds"], did["requests_finished"]),
            "gpu_utilization": min(1.0, _share(did["worker_step_seconds"], did["worker_seconds"])),
            "memory_usage": _share(used, blocks),
            "cache_hit_rate": _share(did["prefix_hits"], did["prefix_queries"]),
            "time_to_first_token": _share(did["first_token_seconds"], did["first_token_requests"]),
            "time_per_output_token": _share(did["later_token_seconds"], did["later_tokens"]),
            "busy_share": _share(did["worker_step_seconds"], did["worker_step_seconds"] + did["worker_idle_seconds"]),
            "requests_per_second": _share(did["requests_finished"], end - begin),
            "window_seconds": end - begin,
        }

    def sums(self, now: float) -> Sums:
        """What another monitor needs to go on."""
        return Sums(self._began, now, dict(self._totals), self._seen)

    def summary(self, now: float) -> dict[str, float]:
        """The whole time since the start, in the units of `figures`; requests however they ended."""
        did, seconds = self._totals, now - self._began
        return {
            "avg_throughput": _share(did["worker_tokens"], seconds),
            "avg_latency": _share(did["request_seconds"], did["requests_finished"]),
            "avg_gpu_utilization": min(1.0, _share(did["worker_step_seconds"], did["worker_seconds"])),
            "total_requests": did["requests_finished"] + did["requests_failed"] + did["requests_aborted"],
            "total_time": seconds,
        }


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
