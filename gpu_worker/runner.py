"""What the worker's loop asks of a runner, and what it hands over. No torch here.

The loop receives a plan, keeps the records and the host's slot table, and turns the plan into a `Step`. A runner
computes it: `start` on the main thread, in plan order, `finish` on the output thread, in the same order. A runner
on a GPU returns from `start` once the work is enqueued, so that the next plan is prepared while the step runs; a
runner on the CPU computes there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from protocol.columns import EMPTY, Float32, Int32, UInt8
from protocol.messages import Defaults, Geometry, Plan, SamplingParams


class Record:
    """A choice as the worker knows it, from ADMIT until it is dropped.

    `history` is an int32 buffer of at least `length` tokens: prompt, tokens known at admission, tokens sampled here
    since. The output thread appends (in `append`); the main thread reads only positions below a length that a plan's
    acknowledgement has already covered, so no lock is needed.
    """

    __slots__ = ("history", "id", "length", "params", "prompt_length", "seed")

    def __init__(self, id: int, prompt: Int32, known: Int32, seed: int, params: SamplingParams, max_model_len: int) -> None:
        self.id = id
        self.prompt_length = len(prompt)
        self.length = len(prompt) + len(known)
        room = min(max_model_len, self.prompt_length + max(params.max_tokens, 1)) + 1
        self.history: Int32 = np.zeros(max(room, self.length), dtype=np.int32)
        self.history[: self.prompt_length] = prompt
        self.history[self.prompt_length : self.length] = known
        self.seed = seed
        self.params = params

    def append(self, token: int) -> None:
        """Take a token sampled here."""
        self.history[self.length] = token
        self.length += 1


@dataclass(slots=True)
class Step:
    """A plan, ready to run: its columns as arrays, with records in the place of ids. All arrays are read-only views.

    Rows are as in `Plan`. `prefill` holds, flat and in row order, the token ids of those positions whose tokens are
    known on the host (a row's `known[i]` of its `counts[i]`: the first ones); the others, at most one a row and
    always its last, are the slot's last sampled token, which stays on the device.
    """

    plan: Plan
    records: list[Record]  # per row
    slots: Int32
    starts: Int32
    counts: Int32
    outputs: Int32
    known: Int32  # per row: how many of its tokens stand in `prefill`
    prefill: Int32
    fork_rows: Int32
    fork_slots: Int32
    fork_records: list[Record]
    bind_slots: Int32  # slots bound by this plan, their records beside them
    bind_records: list[Record]
    scores: Int32 = field(default_factory=lambda: EMPTY)  # per row: the first prompt position it reports, 0 for none; or empty
    after_rest: bool = False  # no slot was bound when its plan came: until then there was no work

    @classmethod
    def nothing(cls) -> Step:
        """A step without rows."""
        return cls(Plan(step=0), [], EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, [], EMPTY, [])

    @property
    def all_sample(self) -> bool:
        """Whether the outputs are the rows: each of them samples, and none is forked."""
        return not len(self.fork_slots) and np.count_nonzero(self.outputs) == len(self.outputs)

    @property
    def output_slots(self) -> Int32:
        """The slot of each output, shape [outputs]: rows that sample, then forks."""
        return self.slots if self.all_sample else np.concatenate((self.slots[self.outputs > 0], self.fork_slots))

    @property
    def output_records(self) -> list[Record]:
        """The record of each output, in the order of `output_slots`."""
        return self.records if self.all_sample else [r for r, n in zip(self.records, self.outputs, strict=True) if n] + self.fork_records

    @property
    def output_positions(self) -> Int32:
        """The absolute position of each sampled token, shape [outputs]: the row's end, for its forks too."""
        ends = self.starts + self.counts
        return ends if self.all_sample else np.concatenate((ends[self.outputs > 0], ends[self.fork_rows]))


@dataclass(slots=True)
class RowScores:
    """Log probabilities of a row's prompt at positions first, first + 1, …; see protocol.messages.Scores."""

    row: int
    first: int
    ids: Int32  # [positions · (1 + alternatives)]
    values: Float32
    ranks: Int32  # [positions]


@dataclass(slots=True)
class Outcome:
    """What a step gave, one entry per output of the plan (shapes [outputs])."""

    tokens: Int32  # −1 where there is none
    flags: UInt8  # STOPPED, NAN, DEAD of protocol.messages
    seconds: float = 0.0
    idle: float = 0.0  # of the device, in seconds, since the step before, whether or not there was work
    copied: int = 0
    lp_counts: Int32 = field(default_factory=lambda: EMPTY)
    lp_ids: Int32 = field(default_factory=lambda: EMPTY)
    lp_values: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))
    lp_ranks: Int32 = field(default_factory=lambda: EMPTY)
    scores: list[RowScores] = field(default_factory=list)  # in the order of rows and positions


@dataclass(slots=True)
class Description:
    """What a loaded runner is; READY announces it."""

    model: str
    fingerprint: bytes
    geometry: Geometry
    attention: str
    eos: list[int]
    bos: int = -1
    defaults: Defaults = field(default_factory=Defaults)
    tokenizer: bytes = b""  # hash of the tokenizer bundle, 16 bytes
    bundle: bytes = b""  # the tokenizer files (protocol.tokenizer_files), served over the wire


class Runner(Protocol):
    """One step after another. `start` and `finish` are called in plan order, `start` from the main thread,
    `finish` from the output thread; between `start(k)` and `finish(k)` later steps may be started."""

    counter: int  # moves as long as a running step does (layers begun, or device events)

    def load(self) -> Description:
        """Load the model, measure the memory, allocate the cache. Raises gpu_worker.errors.LoadError, one line."""

    def start(self, step: Step) -> None:
        """Apply the plan's bindings, table entries and copies, then compute its rows. Raises if the step fails."""

    def finish(self, step: Step) -> Outcome:
        """Wait until the step is done and return what it sampled. Blocks with the GIL released."""

    def reset(self) -> None:
        """The session is over: forget all slots. Blocks keep their content, nothing is in flight."""

    def idle(self, interrupted: Callable[[], bool]) -> bool:
        """Prepare a little of what later steps may need, while nothing is in flight; main thread. Returns whether there is more.

        Gives up early once `interrupted()` is true: something has arrived.
        """
