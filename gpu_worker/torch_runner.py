"""The runner that computes a real model with plain torch, one step at a time; what the CPU runs.

`start` computes and returns with the step done; `finish` hands over its outcome. torch is imported by `load`, so that a
worker says HELLO before those seconds and so that its threads can be set up first.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from gpu_worker.cpu_threads import choose_threads
from gpu_worker.errors import LoadError
from gpu_worker.runner import Description, Outcome, Step
from gpu_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from gpu_worker.torch_step import TorchStep


class TorchRunner:
    """A Runner (see gpu_worker.runner)."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._step: TorchStep | None = None
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._ended = 0.0
        self.counter = 0

    def load(self) -> Description:
        threads = choose_threads(self._settings.threads)
        try:
            from gpu_worker.torch_step import TorchStep
        except ImportError as error:
            raise LoadError(f"the runner 'torch' needs the extra pagewire[worker]: {error}") from error
        self._step, description = TorchStep.load(self._settings, threads, self._begun)
        return description

    def start(self, step: Step) -> None:
        assert self._step is not None
        began = time.perf_counter()
        idle = began - self._ended if self._ended else 0.0
        outcome = self._step.run(step)
        self._ended = time.perf_counter()
        outcome.seconds, outcome.idle = self._ended - began, idle
        self._outcomes.put(outcome)

    def finish(self, step: Step) -> Outcome:
        return self._outcomes.get()

    def reset(self) -> None:
        assert self._step is not None
        self._step.reset()
        self._outcomes = queue.SimpleQueue()

    def idle(self, interrupted: Callable[[], bool]) -> bool:
        return False

    def _begun(self) -> None:
        self.counter += 1
