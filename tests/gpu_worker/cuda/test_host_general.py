"""Steps with all sampling parameters as the card's worker enqueues them, with the sampling kernel played: the CPU worker's tokens,
flags and log probabilities for the same logits, and no wait for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gpu_worker.cuda.general import General, needs_general, report
from gpu_worker.cuda.state import MAX_STOP_IDS, DeviceState
from gpu_worker.logprobs import NO_LOGPROBS, columns
from gpu_worker.philox import gumbel, philox
from gpu_worker.runner import Outcome, Record, Step
from gpu_worker.sampler import Sampler
from gpu_worker.stops import SlotEnds
from gpu_worker.transfer import Arrival
from protocol.columns import EMPTY, Int32, pack, pack_floats, unpack
from protocol.messages import DEAD, NAN, STOPPED, Geometry, Plan, SamplingParams
from tests.gpu_worker.no_wait import META, Copies

VOCAB, WIDTH = 203, 208
GEOMETRY = Geometry(
    block_size=16, blocks=500, host_blocks=0, slots=16, max_model_len=512, max_step_tokens=256, vocab_size=VOCAB
)  # fmt: skip
CPU = torch.device("cpu")

ROWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 5, "temperature": 2.0},
    {"top_p": 0.8},
    {"top_p": 0.9, "top_k": 20, "min_p": 0.01, "logprobs": 2},
    {"logprobs": 4, "temperature": 0.0},
    {"repetition_penalty": 1.7, "frequency_penalty": 0.9, "temperature": 0.0},
    {"bias_ids": pack([4, 5]), "bias_values": pack_floats([3.0, -2.0])},
    {"allowed_ids": pack([1, 2, 3]), "logprobs": 0},
    {"bad_words": [pack([4]), pack([1, 2, 3])], "temperature": 0.0},
    {"stop_ids": pack(range(0, 2 * MAX_STOP_IDS + 20, 2)), "min_tokens": 3},
    {"stop_ids": pack(range(1, 200, 9)), "logprobs": 1},
]


class PlayedForward:
    """Logits given by the test, and the sampling kernel's work done one output at a time, as kernels/sampler.cu says it."""

    def __init__(self, state: DeviceState) -> None:
        self.state, self.logits_width = state, WIDTH
        self.logits = torch.zeros(0)
        self.params: dict[int, SamplingParams] = {}
        self.seeds: dict[int, int] = {}
        self.sampled: tuple[list[int], list[int]] = [], []

    def prepare(self, step: Step, logits: torch.Tensor) -> None:
        """What the kernel `prepare` leaves, and a forward pass."""
        for slot, record in zip(step.bind_slots.tolist(), step.bind_records, strict=True):
            self.params[slot], self.seeds[slot] = record.params, record.seed
            self.state.dead[slot] = 0
        rank = np.cumsum(step.outputs > 0) - 1
        rows = np.concatenate((rank[step.outputs > 0], rank[step.fork_rows]))
        outputs = np.stack((rows, step.output_slots, step.output_positions, rows * 0), axis=1).astype(np.int32)
        self.state.outputs[: len(outputs)] = torch.from_numpy(outputs).to(self.state.outputs.device)
        self.logits = torch.nn.functional.pad(logits, (0, WIDTH - VOCAB), value=-torch.inf)

    def wide_logits(self, rows: int) -> torch.Tensor:
        return self.logits[:rows].to(torch.float32, copy=True)

    def logits_behind(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits[tokens].float()

    def sample(self, stream: int, outputs: int, wide: torch.Tensor | None = None) -> None:
        assert wide is not None
        assert wide.is_contiguous()
        if wide.device == META:
            return
        self.sampled = [], []
        for row, slot, position, _ in self.state.outputs[:outputs].tolist():
            token, flag = self._one(wide[row], slot, position)
            self.sampled[0].append(token)
            self.sampled[1].append(flag)

    def _one(self, logits: torch.Tensor, slot: int, position: int) -> tuple[int, int]:
        p, seed = self.params[slot], self.seeds[slot]
        if p.temperature > 0:
            key = torch.tensor([seed & 0xFFFFFFFF]), torch.tensor([seed >> 32])
            words = philox(key, (torch.tensor([position]), torch.arange(WIDTH // 4)))
            logits = logits / np.float32(p.temperature) + gumbel(torch.stack(words, 1)).reshape(-1)
        if self.state.dead[slot]:
            return -1, DEAD
        if logits.isnan().any() or logits.max() == -torch.inf:
            self.state.dead[slot] = 1
            return -1, NAN
        token = int(logits.argmax())
        self.state.last_token[slot] = token
        if token in unpack(p.stop_ids)[:MAX_STOP_IDS]:
            self.state.dead[slot] = 1
            return token, STOPPED
        return token, 0


class Both:
    """The card's path and the CPU worker's, step by step on the same logits."""

    def __init__(self) -> None:
        self.state = DeviceState(GEOMETRY, CPU, spread=33, tile_tokens=64, entries=2, results=2)
        self.forward = PlayedForward(self.state)
        self.general = General(self.state, self.forward)  # type: ignore[arg-type]
        self.sampler, self.ends = Sampler(GEOMETRY.slots, VOCAB, CPU), SlotEnds(GEOMETRY.slots, CPU)

    def card(self, step: Step, logits: torch.Tensor) -> Outcome:
        self.forward.prepare(step, logits)
        self.general.bind(step)
        beside = self.general.sample(step, 0)
        tokens, flags = self.forward.sampled
        outcome = Outcome(np.array(tokens, np.int32), np.array(flags, np.uint8))
        if beside is not None:
            beside.add_to(outcome)
        return outcome

    def cpu(self, step: Step, logits: torch.Tensor) -> Outcome:
        for slot, record in zip(step.bind_slots.tolist(), step.bind_records, strict=True):
            self.sampler.bind(slot, record)
            self.ends.bind(slot, record)
        rank = np.cumsum(step.outputs > 0) - 1
        logits = logits[np.concatenate((rank[step.outputs > 0], rank[step.fork_rows]))]
        sampled = self.sampler.sample(logits, step.output_slots, step.output_positions)
        settled = self.ends.settle(self.sampler.on_device(step.output_slots), sampled.tokens)
        tokens, flags, *told = Arrival(*settled, *(sampled.told.tensors if sampled.told else ())).read()
        rows = sampled.reported
        lp = columns(rows.rows, rows.wanted, tokens, *told) if rows else NO_LOGPROBS
        return Outcome(tokens, flags.astype(np.uint8), 0, 0, 0, lp.counts, lp.ids, lp.values, lp.ranks)

    def step(self, step: Step, logits: torch.Tensor) -> Outcome:
        mine, other = self.card(step, logits), self.cpu(step, logits)
        for name in ("tokens", "flags", "lp_counts", "lp_ids", "lp_values", "lp_ranks"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(other, name), name)
        live = np.flatnonzero((mine.flags & (DEAD | NAN)) == 0)
        slots = step.output_slots[live]
        assert self.state.last_token[slots].tolist() == self.ends.last_token[slots].tolist() == mine.tokens[live].tolist()
        assert (self.state.dead[:-1] != 0).tolist() == (self.ends.dead != 0).tolist()
        return mine


def record(i: int, params: dict[str, Any]) -> Record:
    return Record(i, np.arange(1, 8, dtype=np.int32), EMPTY, (i << 40) + 3, SamplingParams(90, **params), 512)


def step_of(slots: list[int], position: int, new: list[Record] | None = None, forks: list[int] | None = None) -> Step:
    """A decode step of slots; `new`: their records; forks: slots that take the first row's logits."""
    n, own = len(slots), np.array(slots, np.int32)

    def every(value: int) -> Int32:
        return np.full(n, value, np.int32)

    bound = np.array(slots + (forks or []), np.int32) if new else EMPTY
    fork_slots, fork_rows = np.array(forks or [], np.int32), np.zeros(len(forks or []), np.int32)
    rest = (new or [])[n:]
    return Step(
        Plan(step=1), [], own, every(position - 1), every(1), every(1), every(0), EMPTY, fork_rows, fork_slots, rest, bound, new or []
    )


def logits_of(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def test_twenty_steps_of_every_parameter_give_what_the_cpu_gives() -> None:
    both, n = Both(), len(ROWS)
    slots = list(range(n))[::-1]
    seen = set()
    for k in range(20):
        step = step_of(slots, 7 + k, [record(i, params) for i, params in enumerate(ROWS)] if k == 0 else None)
        seen |= set(both.step(step, logits_of(n, k)).flags.tolist())
    assert seen == {0, STOPPED, DEAD}


def test_a_fork_edits_logits_of_its_own() -> None:
    both = Both()
    new = [record(i, {"temperature": 0.0, "bias_ids": pack([9 * i]), "bias_values": pack_floats([50.0])}) for i in range(4)]
    assert both.step(step_of([3, 5], 7, new, forks=[1, 2]), logits_of(2, 0)).tokens.tolist() == [0, 9, 18, 27]
    both.step(step_of([5, 1, 2, 3], 8), logits_of(4, 1))


def test_a_stop_id_beyond_those_that_the_kernel_takes_ends_its_choice_until_the_slot_is_bound_again() -> None:
    both = Both()
    many = record(0, {"temperature": 0.0, "stop_ids": pack(range(100, 100 + MAX_STOP_IDS + 2))})
    few = record(0, {"temperature": 0.0, "stop_ids": pack([3])})
    logits = torch.zeros(1, VOCAB)
    logits[0, 101 + MAX_STOP_IDS] = 1.0
    assert both.step(step_of([2], 7, [many]), logits).flags.tolist() == [STOPPED]
    assert both.step(step_of([2], 8), logits).flags.tolist() == [DEAD]
    assert both.step(step_of([2], 7, [few]), logits).flags.tolist() == [0]
    beside = record(1, {"temperature": 0.0, "stop_ids": pack(range(MAX_STOP_IDS + 2))})
    assert both.step(step_of([4, 2], 7, [beside, few]), logits.repeat(2, 1)).flags.tolist() == [0, 0]


def test_a_nan_ends_its_own_row_and_a_slot_bound_again_lives_and_forgets() -> None:
    both = Both()
    logits = logits_of(2, 0)
    logits[1, 50] = torch.nan
    params: dict[str, Any] = {"top_p": 0.9, "logprobs": 2, "frequency_penalty": 2.0, "stop_ids": pack(range(60))}
    assert both.step(step_of([0, 1], 7, [record(i, params) for i in range(2)]), logits).flags[1] == NAN
    assert both.step(step_of([0, 1], 8), logits_of(2, 1)).flags[1] == DEAD
    assert both.step(step_of([0, 1], 7, [record(i, {"top_k": 3}) for i in range(2)]), logits_of(2, 2)).flags.tolist() == [0, 0]


@pytest.mark.parametrize("rows", [*([params] for params in ROWS), ROWS], ids=str)
def test_nothing_waits_for_the_card(rows: list[dict[str, Any]]) -> None:
    state = DeviceState(GEOMETRY, META, spread=33, tile_tokens=64, entries=2, results=2)
    forward = PlayedForward(state)
    general = General(state, forward)  # type: ignore[arg-type]
    forward.logits = torch.zeros(len(rows), WIDTH, device=META, dtype=torch.bfloat16)
    for k in range(3):
        with Copies() as copies:
            step = step_of(list(range(len(rows))), 7 + k, [record(i, p) for i, p in enumerate(rows)] if k == 0 else None)
            general.bind(step)
            beside = general.sample(step, 0)
    reports = any("logprobs" in p or len(p.get("stop_ids", b"")) // 4 > MAX_STOP_IDS for p in rows)
    assert (beside is not None) == reports
    assert copies.out == int(reports)
    assert copies.in_ <= 1, "stop ids while they are banned"


def test_prompts_are_scored_without_a_wait() -> None:
    state = DeviceState(GEOMETRY, META, spread=33, tile_tokens=64, entries=2, results=2)
    forward = PlayedForward(state)
    forward.logits = torch.zeros(6, WIDTH, device=META, dtype=torch.bfloat16)
    step = step_of([0], 7)
    step.starts, step.counts, step.scores = (np.array([v], np.int32) for v in (0, 6, 1))
    step.records = [record(0, {"prompt_logprobs": 2})]
    with Copies() as copies:
        scores = report(step, forward)  # type: ignore[arg-type]
    assert (copies.in_, copies.out) == (1, 1)
    assert scores is not None
    assert [(one.first, len(one.ranks)) for one in scores.read()] == [(1, 6)]


def test_what_the_kernel_samples_alone_never_comes_here() -> None:
    assert [needs_general(record(i, params)) for i, params in enumerate(ROWS)] == [False, False, *[True] * 10]
