"""A kill switch for fault tests: the process kills itself, as SIGKILL does, when it reaches a named phase of a step.

    PAGEWIRE_KILL=PHASE[:COUNT[:FILE]]

PHASE is one of PHASES; COUNT (1) says at which time it is reached; FILE is made when the switch fires and disarms it
if it is there already, so that a replacement started with the same environment lives, and a test knows that it fired.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import numpy as np

from gpu_worker.runner import Outcome, Step
from protocol.messages import STOPPED

PHASES = (
    "plan_received",  # a plan is decoded, nothing of it is applied
    "prefill_chunk",  # a chunk that does not end its prefill has been started
    "step_started",
    "forward_done",  # the runner has given the outcome, the records have not taken it
    "first_token",  # the same, and the step sampled a choice's first token
    "last_token",  # the same, and the step sampled a choice's last token
    "result_unsent",  # the result is made, not sent
)


@dataclass(slots=True)
class KillSwitch:
    """Counts how often `phase` is reached; kills the process at the `count`-th time. Without a phase it does nothing."""

    phase: str = ""
    count: int = 1
    file: str = ""

    @classmethod
    def parse(cls, text: str) -> KillSwitch:
        """From the form above; empty for none. Raises ValueError, one line."""
        phase, _, rest = text.partition(":")
        count, _, file = rest.partition(":")
        if phase and phase not in PHASES:
            raise ValueError(f"PAGEWIRE_KILL: {phase!r} is none of {', '.join(PHASES)}")
        if count and not count.isdecimal():
            raise ValueError(f"PAGEWIRE_KILL: {count!r} is not a count")
        return cls(phase, int(count or 1), file)

    def reached(self, phase: str) -> None:
        """This phase is reached now."""
        if phase == self.phase:
            self.count -= 1
            if self.count == 0:
                self._fire()

    def started(self, step: Step) -> None:
        """The runner has started a step."""
        if self.phase and not step.outputs.all():
            self.reached("prefill_chunk")
        self.reached("step_started")

    def finished(self, step: Step, outcome: Outcome) -> None:
        """The runner has finished a step."""
        self.reached("forward_done")
        if self.phase in ("first_token", "last_token"):
            made = step.output_positions - np.array([r.prompt_length for r in step.output_records], np.int32)
            limits = np.array([r.params.max_tokens for r in step.output_records], np.int32)
            if self.phase == "first_token" and (made == 0).any():
                self.reached("first_token")
            if self.phase == "last_token" and ((made + 1 == limits) | (outcome.flags == STOPPED)).any():
                self.reached("last_token")

    def _fire(self) -> None:
        if self.file:
            try:
                os.close(os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                return
        os.kill(os.getpid(), signal.SIGKILL)
