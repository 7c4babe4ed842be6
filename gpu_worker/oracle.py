"""The oracle runner: no model, yet every byte of its output depends on every block table it was sent.

Its KV cache holds integers. At (block, offset) it stores the running hash of the prefix up to that token, written
through the block table of the plan and read back through it, whole, in every later step: a stale plan, a wrong table,
a block reused too early or one with two owners changes the output. `oracle_stream.py` defines that output;
`expected` computes it from the prompt alone.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from gpu_worker.byte_model import VOCAB, byte_geometry, describe_bytes
from gpu_worker.oracle_stream import (
    UInt64,
    draws,
    entries,
    expected,
    expected_prompt_logprobs,
    expected_with_logprobs,
    pairs,
    pick,
    pick_one,
    seed_used,
    weights,
)
from gpu_worker.prompt_scores import asked
from gpu_worker.runner import Description, Outcome, RowScores, Step
from gpu_worker.settings import WorkerSettings
from gpu_worker.slots import BlockTables
from protocol.columns import Int32, unpack
from protocol.messages import DEAD, NAN, STOPPED

__all__ = ["MARKS", "OracleRunner", "StepError", "expected", "expected_prompt_logprobs", "expected_with_logprobs"]

MARKS = ("raise", "crash", "hang", "nan", "nan_once")  # what computing a marked token does

_NAN = np.uint64(2**64 - 1)  # stored where a real cache would hold NaN
_UNWRITTEN = np.uint64(0x5EED)

Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class StepError(Exception):
    """The step computed a token that is marked to raise."""


class OracleRunner:
    """A runner whose output proves that every step was sent the right tables. Its vocabulary is bytes, EOS and BOS.

    `step_time` is slept in every step, in seconds. `marks` maps token ids to what computing them does: "raise" an
    error, "crash" the process (SIGKILL), "hang" the main thread for good, or "nan": what is stored from that position
    on is NaN, and so is every output that reads it; "nan_once" does so the first time only, as a passing fault of the
    device would. Raises ValueError for another word.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        step_time: float = 0.0,
        marks: Mapping[int, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counter = 0
        self._settings = settings
        self._step_time = step_time
        self._clock = clock  # for the steps' durations only
        self._marks = dict(marks or {})
        if unknown := set(self._marks.values()) - set(MARKS):
            raise ValueError(f"a token can be marked {', '.join(MARKS)}; not {unknown.pop()!r}")
        self._outcomes: deque[Outcome] = deque()
        g = self._geometry = byte_geometry(settings)
        self._tables = BlockTables(g.slots, g.table_width)
        # The last row is the dummy page: dead slots write there, and unassigned entries (−1) read it.
        self.cache: UInt64 = np.full((g.blocks + 1, g.block_size), _UNWRITTEN)
        self.host_cache: UInt64 = np.full((g.host_blocks, g.block_size), _UNWRITTEN)
        self._weights = weights(g.table_width * g.block_size)
        # Per slot: last sampled token, whether it is dead, and what its record asks for.
        self._last = np.zeros(g.slots, np.int32)
        self._dead = np.zeros(g.slots, np.bool_)
        self._seeds = np.zeros(g.slots, np.uint64)
        self._stops = np.zeros((g.slots, VOCAB), np.bool_)
        self._stops_from = np.zeros(g.slots, np.int64)  # stop ids are banned at positions before this one
        self._logprobs = np.full(g.slots, -1, np.int32)

    def load(self) -> Description:
        """Describe this worker; there is nothing to load."""
        return describe_bytes(self._settings, "oracle")

    def reset(self) -> None:
        """The session is over: forget tables and slots. Blocks keep their content."""
        self._outcomes.clear()
        self._tables.clear()
        self._dead.fill(False)

    def idle(self, interrupted: Callable[[], bool]) -> bool:
        return False

    def start(self, step: Step) -> None:
        """Run the step. Raises StepError for a token marked so."""
        began = self._clock()
        if self._step_time:
            time.sleep(self._step_time)
        self.counter += 1
        self._bind(step)
        self._tables.apply(step.plan)
        self._copy(step)
        outcome = Outcome(np.zeros(0, np.int32), np.zeros(0, np.uint8))
        if len(step.slots):
            tokens, positions, row_of = self._inputs(step)
            self._fault(step, tokens, row_of)
            self._write(step, tokens, positions, row_of)
            outcome = self._sample(step, tokens)
            if len(step.scores):
                outcome.scores = self._scores(step)
        outcome.copied = step.plan.step
        outcome.seconds = self._clock() - began
        self._outcomes.append(outcome)

    def finish(self, step: Step) -> Outcome:
        """Make the step's copies to the host, as late as a device may, and return what it sampled."""
        if step.plan.out_to:
            self.host_cache[unpack(step.plan.out_to)] = self.cache[unpack(step.plan.out_from)]
        return self._outcomes.popleft()

    # ------------------------------------------------------------ parts of a step

    def _bind(self, step: Step) -> None:
        for slot, record in zip(step.bind_slots.tolist(), step.bind_records, strict=True):
            params = record.params
            self._dead[slot] = False
            self._seeds[slot] = seed_used(record.seed, params.temperature)
            self._stops[slot] = False
            self._stops[slot, unpack(params.stop_ids)] = True
            self._stops_from[slot] = record.prompt_length + params.min_tokens
            self._logprobs[slot] = params.logprobs

    def _copy(self, step: Step) -> None:
        plan = step.plan
        if plan.copy_to:
            self.cache[unpack(plan.copy_to)] = self.cache[unpack(plan.copy_from)]
        if plan.out_to:  # a device may begin to write there now, and end as late as `finish`
            self.host_cache[unpack(plan.out_to)] = _UNWRITTEN
        if plan.in_to:
            self.cache[unpack(plan.in_to)] = self.host_cache[unpack(plan.in_from)]

    def _inputs(self, step: Step) -> tuple[Index, Index, Index]:
        """Token, position and row of everything the step computes, flat in row order."""
        row_of = np.repeat(np.arange(len(step.slots)), step.counts)
        offsets = np.arange(len(row_of)) - _firsts(step)[row_of]
        tokens = self._last[step.slots[row_of]].astype(np.int64)
        tokens[offsets < step.known[row_of]] = step.prefill
        return tokens, step.starts[row_of] + offsets, row_of

    def _fault(self, step: Step, tokens: Index, row_of: Index) -> None:
        if not self._marks:
            return
        computed = set(tokens[~self._dead[step.slots[row_of]]].tolist())
        effects = {self._marks[token] for token in computed & self._marks.keys()}
        if "raise" in effects:
            raise StepError("a token of the step is marked to raise")
        if "crash" in effects:
            os.kill(os.getpid(), signal.SIGKILL)
        while "hang" in effects:
            time.sleep(3600)

    def _write(self, step: Step, tokens: Index, positions: Index, row_of: Index) -> None:
        """Store P at every position of the step, through the tables."""
        size = self._geometry.block_size
        flat = self.cache.reshape(-1)
        firsts = _firsts(step)
        totals = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(entries(tokens, positions), out=totals[1:])
        sums = totals[1:] - totals[firsts][row_of]
        poisoned = self._poisoned(tokens, row_of)

        slots = step.slots[row_of]
        blocks = self._tables.table[slots, positions // size].astype(np.int64)
        blocks[self._dead[slots]] = self._geometry.blocks
        targets = blocks * size + positions % size
        before = np.maximum(step.starts - 1, 0)
        bases = self._tables.table[step.slots, before // size].astype(np.int64) * size + before % size

        def store(at: Index | slice) -> None:
            row = row_of[at]
            base = np.where(step.starts[row] > 0, flat[bases[row]], np.uint64(0))
            flat[targets[at]] = np.where(poisoned[at] | (base == _NAN), _NAN, sums[at] + base)

        # A row may go on from a block that another row of the same step fills. That one starts at a lower position,
        # so rows that wait are stored one by one in the order of their starts.
        filled = set(targets.tolist())  # np.isin sorts: ten times as long for the few rows of a step
        if filled.isdisjoint(bases.tolist()):
            store(slice(None))
            return
        waits = np.array([base in filled for base in bases.tolist()], np.bool_) & (step.starts > 0)
        store(np.flatnonzero(~waits[row_of]))
        waiting = np.flatnonzero(waits)
        for row in waiting[np.argsort(step.starts[waiting])].tolist():
            store(slice(firsts[row], firsts[row] + step.counts[row]))

    def _poisoned(self, tokens: Index, row_of: Index) -> Mask:
        """Which of the flat positions lie at or behind a token marked "nan" in their row."""
        poisoned = np.zeros(len(tokens), np.bool_)
        marked = [token for token, effect in self._marks.items() if effect in ("nan", "nan_once")]
        for at in np.flatnonzero(np.isin(tokens, marked)).tolist() if marked else ():
            poisoned[at:] |= row_of[at:] == row_of[at]
        for token in marked:
            if self._marks[token] == "nan_once" and token in tokens:
                del self._marks[token]
        return poisoned

    def _sample(self, step: Step, tokens: Index) -> Outcome:
        """Draw every output from what its row reads along its table."""
        rows: Index = np.concatenate((np.flatnonzero(step.outputs), step.fork_rows))
        slots, ends = step.output_slots, (step.starts + step.counts)[rows]
        digests, nan = self._read(step.slots[rows], ends)
        hashes = draws(digests, self._seeds[slots], ends)
        last = tokens[np.cumsum(step.counts)[rows] - 1]
        sampled = pick(hashes, last)
        stopped = self._stops[slots, sampled]
        for i in np.flatnonzero(stopped & (ends < self._stops_from[slots])).tolist():
            sampled[i] = pick_one(int(hashes[i]), int(last[i]), np.flatnonzero(self._stops[slots[i]]).tolist())
            stopped[i] = False
        dead = self._dead[slots] | self._dead[step.slots[rows]]
        flags = np.where(dead, DEAD, np.where(nan, NAN, np.where(stopped, STOPPED, 0))).astype(np.uint8)
        taken = ~(dead | nan)
        self._last[slots[taken]] = sampled[taken]
        self._dead[slots] |= flags != 0
        outcome = Outcome(np.where(taken, sampled, -1).astype(np.int32), flags)
        if (self._logprobs[slots] >= 0).any():
            _add_logprobs(outcome, hashes, self._logprobs[slots])
        return outcome

    def _scores(self, step: Step) -> list[RowScores]:
        """What the rows report of their prompts, from everything stored along their tables before each position."""
        reported = asked(step)
        if reported is None:
            return []
        told: list[RowScores] = []
        for part in reported.slices():
            positions, tokens, wanted = reported.positions[part], reported.tokens[part].tolist(), reported.wanted[part].tolist()
            digests, nan = self._read(step.slots[reported.rows[part]], positions)
            hashes = draws(digests, np.zeros(len(digests), np.uint64), positions)
            made = [pair for h, token, n in zip(hashes.tolist(), tokens, wanted, strict=True) for pair in pairs(h, token, n)]
            values = np.array([value for _, value in made], np.float32)
            values[np.repeat(nan, reported.wanted[part] + 1)] = np.nan
            told += reported.report(part, np.array([id for id, _ in made], np.int32), values, np.ones(len(tokens), np.int32))
        return told

    def _read(self, slots: Int32, ends: Int32) -> tuple[UInt64, Mask]:
        """D of each output, from everything stored along the table of its slot before its end, and whether a NaN is there."""
        size = self._geometry.block_size
        width = -(-int(ends.max(initial=0)) // size)
        stored = self.cache[self._tables.table[slots, :width]].reshape(len(slots), width * size)
        stored[np.arange(width * size) >= ends[:, None]] = 0
        digests = (stored * self._weights[: width * size]).sum(axis=1, dtype=np.uint64)
        return digests, (stored == _NAN).any(axis=1)


def _firsts(step: Step) -> Index:
    """Where each row begins among the step's flat tokens, shape [rows]."""
    return np.cumsum(step.counts) - step.counts


def _add_logprobs(outcome: Outcome, hashes: UInt64, wanted: npt.NDArray[np.int32]) -> None:
    """Enter the pairs of outputs whose record wants logprobs (`wanted` ≥ 0, shape [outputs])."""
    chosen = np.flatnonzero((wanted >= 0) & (outcome.tokens >= 0)).tolist()
    made = [pair for i in chosen for pair in pairs(int(hashes[i]), int(outcome.tokens[i]), int(wanted[i]))]
    outcome.lp_counts = wanted + np.int32(1)
    outcome.lp_ids = np.array([id for id, _ in made], np.int32)
    outcome.lp_values = np.array([value for _, value in made], np.float32)
    outcome.lp_ranks = np.ones(len(chosen), np.int32)
