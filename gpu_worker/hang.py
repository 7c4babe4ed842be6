"""A step that runs on though its session has ended: if it hangs, only a new process can serve again."""

from __future__ import annotations

from math import inf

from gpu_worker.runner import Runner

PATIENCE = 5  # × the progress time: how long a step may stand still


class HangWatch:
    """Looks at the runner's counter from time to time. `at` is when to look next; infinity while nothing is watched."""

    def __init__(self, runner: Runner, progress: float) -> None:
        self.at = inf
        self._runner = runner
        self._patience = PATIENCE * progress
        self._seen = 0

    def begin(self, now: float) -> None:
        """A session has ended, and its last step may still run."""
        self._seen = self._runner.counter
        self.at = now + self._patience

    def end(self) -> None:
        """Nothing of an ended session runs any more."""
        self.at = inf

    def hangs(self, now: float) -> bool:
        """Whether the step has stood still since the last look. If not, it gets as long again."""
        if self._runner.counter == self._seen:
            return True
        self.begin(now)
        return False
