"""A worker's sums, for telemetry."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import Result


@dataclass(slots=True)
class Figures:
    """What the worker has done since its start. Times are of the device, in seconds."""

    steps: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    idle_seconds: float = 0.0

    def count(self, result: Result) -> None:
        """A step has ended."""
        self.steps += 1
        self.tokens += len(result.ids) // 4
        self.step_seconds += result.seconds
        self.idle_seconds += result.idle

    def values(self) -> dict[str, float]:
        """By their names in telemetry."""
        return {
            "worker_steps": float(self.steps),
            "worker_tokens": float(self.tokens),
            "worker_step_seconds": self.step_seconds,
            "worker_idle_seconds": self.idle_seconds,
        }
