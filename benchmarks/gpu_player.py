"""Plays the scheduler for one runner in process: hand-made plans through the real WorkerCore, two steps in flight.

No policy, no links: what it measures is the worker's main thread and the card. Used by the tests on a card as well.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_worker.core import WorkerCore
from gpu_worker.runner import Description, Step
from protocol.columns import Int32, pack
from protocol.messages import Admit, Plan, SamplingParams


@dataclass
class Sequence:
    """A choice being played; `tokens` are those sampled so far."""

    record: int
    slot: int
    prompt: Int32
    max_tokens: int
    blocks: list[int]
    computed: int  # tokens in the cache
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0  # time of the first token


class Player:
    """Sequences in, tokens out. `engine` has start(step), finish() and a geometry."""

    def __init__(self, engine: Any, depth: int = 2) -> None:
        self.engine, self.depth = engine, depth
        g = self.geometry = engine.geometry
        self.core = WorkerCore(Description(model="played", fingerprint=b"0" * 16, geometry=g, attention="triton", eos=[]))
        self.free_slots = list(range(g.slots))[::-1]
        self.free_blocks = list(range(g.blocks))[::-1]
        self.generation = np.zeros(g.slots, np.int32)
        self.step = self.records = 0
        self.drops: list[int] = []
        self.frees: list[int] = []
        self.seconds: list[float] = []  # device time of each step
        self.idle: list[float] = []
        self.flight: deque[tuple[Step, list[Sequence]]] = deque()

    def add(
        self, prompt: Int32, max_tokens: int, *, reuse: Sequence | None = None, keep: int | None = None, **params: Any
    ) -> tuple[Sequence, Admit]:
        """A new sequence and its ADMIT; `reuse`: share the cached full blocks of that one (its first `keep` tokens at most)."""
        size = self.geometry.block_size
        slot = self.free_slots.pop()
        shared = min((len(prompt) - 1) // size, (len(prompt) if keep is None else keep) // size) if reuse else 0
        blocks = list(reuse.blocks[:shared]) if reuse else []
        seq = Sequence(self.records, slot, prompt, max_tokens, blocks, shared * size)
        self.records += 1
        self.generation[slot] += 1
        return seq, Admit(
            seq.record,
            pack(prompt),
            b"",
            params.pop("seed", seq.record),
            SamplingParams(max_tokens, params.pop("temperature", 0.0), **params),
        )

    def drop(self, seqs: list[Sequence], free_blocks: bool = True, but: int = 0) -> None:
        """Give up sequences (their first `but` blocks are kept)."""
        for s in seqs:
            self.drops.append(s.record)
            self.frees.append(s.slot)
            self.free_slots.append(s.slot)
            if free_blocks:
                self.free_blocks += s.blocks[but:]

    def send(self, rows: list[tuple[Sequence, int]], new: list[tuple[Sequence, Admit]] = []) -> None:  # noqa: B006
        """One plan: rows of (sequence, tokens); a row samples when it reaches the sequence's end."""
        size = self.geometry.block_size
        self.step += 1
        slots = np.array([s.slot for s, _ in rows], np.int32)
        starts = np.array([s.computed for s, _ in rows], np.int32)
        counts = np.array([n for _, n in rows], np.int32)
        ends = starts + counts
        outputs = np.array([s.computed + n >= len(s.prompt) for s, n in rows], np.int32)
        assign: list[tuple[int, int, int]] = []
        share: list[tuple[int, int, int]] = []
        for s, _ in new:
            share += [(s.slot, i, b) for i, b in enumerate(s.blocks)]
        have = np.array([len(s.blocks) for s, _ in rows], np.int32)
        for i in np.flatnonzero(have * size < ends).tolist():
            s = rows[i][0]
            while len(s.blocks) * size < ends[i]:
                block = self.free_blocks.pop()
                assign.append((s.slot, len(s.blocks), block))
                s.blocks.append(block)
        a, b = (np.array(v, np.int32).reshape(-1, 3) for v in (assign, share))
        plan = Plan(
            step=self.step,
            drops=pack(self.drops),
            frees=pack(self.frees),
            admits=[admit for _, admit in new],
            bind_slots=pack([s.slot for s, _ in new]),
            bind_generations=pack([self.generation[s.slot] for s, _ in new]),
            bind_records=pack([s.record for s, _ in new]),
            assign_slots=pack(a[:, 0]),
            assign_indices=pack(a[:, 1]),
            assign_blocks=pack(a[:, 2]),
            share_slots=pack(b[:, 0]),
            share_indices=pack(b[:, 1]),
            share_blocks=pack(b[:, 2]),
            slots=pack(slots),
            generations=pack(self.generation[slots]),
            starts=pack(starts),
            counts=pack(counts),
            outputs=pack(outputs),
        )
        self.drops, self.frees = [], []
        plan.check(self.geometry)
        step = self.core.apply(plan)
        self.engine.start(step)
        for (s, _), end in zip(rows, ends.tolist(), strict=True):
            s.computed = end
        self.flight.append((step, [s for (s, _), o in zip(rows, outputs.tolist(), strict=True) if o]))
        while len(self.flight) >= self.depth:
            self.receive()

    def receive(self) -> None:
        """Take the oldest step's result."""
        step, seqs = self.flight.popleft()
        outcome = self.engine.finish()
        self.core.result(step, outcome)
        self.seconds.append(outcome.seconds)
        self.idle.append(outcome.idle)
        now = time.perf_counter()
        for s, token in zip(seqs, outcome.tokens.tolist(), strict=True):
            if token >= 0:
                s.first = s.first or now
                s.tokens.append(token)

    def settle(self) -> None:
        """Receive all that is in flight."""
        while self.flight:
            self.receive()

    def prefill(self, new: list[tuple[Sequence, Admit]], chunk: int = 0) -> None:
        """Compute prompts under the step's token budget, first come first served; `chunk`: at most so many tokens a row."""
        waiting = deque(new)
        budget = self.geometry.max_step_tokens
        partial: Sequence | None = None
        while waiting or partial:
            rows: list[tuple[Sequence, int]] = []
            begun: list[tuple[Sequence, Admit]] = []
            left = budget
            while left and (waiting or partial):
                if partial is None:
                    pair = waiting.popleft()
                    begun.append(pair)
                    partial = pair[0]
                n = min(left, len(partial.prompt) - partial.computed, chunk or budget)
                rows.append((partial, n))
                left -= n
                if partial.computed + n < len(partial.prompt):
                    break
                partial = None
            self.send(rows, begun)

    def decode(self, seqs: list[Sequence], steps: int) -> None:
        """So many decode steps of all sequences, shrinking as they reach max_tokens."""
        for _ in range(steps):
            live = [s for s in seqs if s.computed - len(s.prompt) + 1 < s.max_tokens]
            if not live:
                return
            self.send([(s, 1) for s in live])
