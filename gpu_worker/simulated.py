"""The simulated runner: a device that computes nothing and takes exactly as long as it is told.

It keeps virtual time. Step k starts at max(end of step k − 1, arrival of plan k) and ends one step time later, whatever
the machine was doing meanwhile; only its result waits for that moment on the real clock. So the busy share of a
pipeline is measured without the noise of sleeping: Σ step times / (last end − first start).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpu_worker.byte_model import VOCAB, describe_bytes
from gpu_worker.prompt_scores import asked
from gpu_worker.runner import Description, Outcome, RowScores, Step
from gpu_worker.settings import WorkerSettings

SPANS = 1 << 16  # steps remembered
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", np.uint8).astype(np.int32)


@dataclass(frozen=True)
class StepTime:
    """How long a step takes, in seconds: base + per_token · tokens computed + per_kv_token · KV entries read."""

    base: float
    per_token: float = 0.0
    per_kv_token: float = 0.0

    def of(self, step: Step) -> float:
        """The time of one step; a step without rows takes none."""
        if not len(step.slots):
            return 0.0
        seconds = self.base + self.per_token * int(step.counts.sum())
        return seconds + self.per_kv_token * int((step.starts + step.counts).sum()) if self.per_kv_token else seconds


class SimulatedRunner:
    """Emits letters that depend on seed and position alone. Sequences end by length only; no stop id ever comes.

    `clock` and `sleep` are time's, in seconds; a test may bring its own.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        step_time: StepTime | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.counter = 0
        self._settings = settings
        self._step_time = step_time or StepTime(settings.step_time)
        self._clock = clock
        self._sleep = sleep
        self._seeds = np.zeros(settings.max_num_seqs, np.uint64)
        self._end = 0.0  # of the last step, in virtual time; 0 before the first
        self._started: deque[tuple[Outcome, float]] = deque()
        self.spans: deque[tuple[float, float]] = deque(maxlen=SPANS)  # (start, end) of the steps with rows

    def load(self) -> Description:
        """Describe this worker; there is nothing to load."""
        return describe_bytes(self._settings, "simulated")

    def reset(self) -> None:
        """The session is over. The device's time goes on."""
        self._started.clear()

    def idle(self, interrupted: Callable[[], bool]) -> bool:
        return False

    def start(self, step: Step) -> None:
        """Enter the step into virtual time, arriving now."""
        start = max(self._end, self._clock())
        seconds = self._step_time.of(step)
        idle = start - self._end if self._end else 0.0
        if seconds:
            self._end = start + seconds
            self.spans.append((start, self._end))
        for slot, record in zip(step.bind_slots.tolist(), step.bind_records, strict=True):
            self._seeds[slot] = record.seed
        # The multiplier is a prime: a stream visits every letter, and streams of different seeds differ.
        drawn = (self._seeds[step.output_slots] + step.output_positions.astype(np.uint64)) * np.uint64(2654435761)
        tokens = _LETTERS[((drawn >> np.uint64(16)) % np.uint64(len(_LETTERS))).astype(np.int64)]
        outcome = Outcome(tokens, np.zeros(len(tokens), np.uint8), seconds, idle if seconds else 0.0, step.plan.step)
        if len(step.scores):
            outcome.scores = _scores(step)
        self._started.append((outcome, self._end))

    def finish(self, step: Step) -> Outcome:
        """Wait for the step's virtual end, and return what it sampled."""
        outcome, end = self._started.popleft()
        while (left := end - self._clock()) > 0:
            self._sleep(left)
        self.counter += 1
        return outcome

    @property
    def busy_share(self) -> float:
        """Σ step times / (last end − first start) of the steps remembered; 0 before the first."""
        if not self.spans:
            return 0.0
        return sum(end - start for start, end in self.spans) / (self.spans[-1][1] - self.spans[0][0])


def _scores(step: Step) -> list[RowScores]:
    """Every prompt token, and every alternative to it, is as likely as any other."""
    reported = asked(step)
    if reported is None:
        return []
    told: list[RowScores] = []
    for part in reported.slices():
        pairs = reported.wanted[part] + 1
        nth = np.arange(int(pairs.sum())) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        ids = (np.repeat(reported.tokens[part], pairs) + nth) % VOCAB
        values = np.full(len(ids), -np.log(VOCAB), np.float32)
        told += reported.report(part, ids.astype(np.int32), values, np.ones(len(pairs), np.int32))
    return told
