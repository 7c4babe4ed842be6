"""The oracle's stream: what `expected` computes, and every way to spoil it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.core import WorkerCore
from gpu_worker.errors import LoadError
from gpu_worker.oracle import OracleRunner, StepError, expected, expected_with_logprobs
from gpu_worker.runners import make_runner
from gpu_worker.settings import WorkerSettings
from protocol.codec import decode, encode
from protocol.columns import pack, unpack, unpack_floats
from protocol.messages import DEAD, NAN, STOPPED, Admit, Plan, Result, SamplingParams
from tests.gpu_worker.worker_plans import RandomPlanner, Sequence, draw_sequences, rows_of

EOS = pack([256])


class Worker:
    """Core and oracle as the service runs them, without the service. Messages go through the codec."""

    def __init__(self, marks: dict[int, str] | None = None, **sizes: int) -> None:
        defaults = {"block_size": 4, "num_gpu_blocks": 16, "num_cpu_blocks": 8, "max_num_seqs": 4, "max_model_len": 64}
        self.runner = OracleRunner(WorkerSettings(run_dir=Path(), **{**defaults, **sizes}), marks=marks)  # type: ignore[arg-type]
        self.core = WorkerCore(self.runner.load())
        self.geometry = self.core.description.geometry
        self.steps: list = []

    def start(self, plan: Plan) -> None:
        plan = decode(encode(plan))
        plan.check(self.geometry)
        step = self.core.apply(plan)
        self.runner.start(step)
        self.steps.append(step)

    def finish(self) -> Result:
        step = self.steps.pop(0)
        result = decode(encode(self.core.result(step, self.runner.finish(step))))
        result.check(self.geometry)
        return result

    def run(self, plan: Plan) -> Result:
        self.start(plan)
        return self.finish()

    def generate(self, prompt: list[int], seed: int, params: SamplingParams, blocks: list[int]) -> list[int]:
        """One sequence, alone in slot 0 with these blocks, to its end; one step at a time."""
        tokens: list[int] = []
        step = self.core._step + 1
        plan = first_plan(step, prompt, seed, params, blocks)
        while True:
            result = self.run(plan)
            tokens += unpack(result.ids).tolist()
            if result.flags[0] or len(tokens) == params.max_tokens:
                return tokens
            step += 1
            plan = Plan(step, **row(0, 1, len(prompt) + len(tokens) - 1, 1))


def first_plan(step: int, prompt: list[int], seed: int, params: SamplingParams, blocks: list[int], slot: int = 0) -> Plan:
    n = len(blocks)
    columns = rows_of(
        bind_slots=[slot],
        bind_generations=[1],
        bind_records=[step],
        assign_slots=[slot] * n,
        assign_indices=[*range(n)],
        assign_blocks=blocks,
    )
    return Plan(step, admits=[Admit(step, pack(prompt), b"", seed, params)], **columns, **row(slot, 1, 0, len(prompt)))


def row(slot: int, generation: int, start: int, count: int, output: int = 1) -> dict[str, bytes]:
    return rows_of(slots=[slot], generations=[generation], starts=[start], counts=[count], outputs=[output])


PROMPT = list(b"what is the time")


def test_a_sequence_alone_gives_the_expected_stream():
    params = SamplingParams(20, stop_ids=EOS)
    assert Worker().generate(PROMPT, 7, params, [5, 3, 9, 2, 11, 1, 0, 8, 4]) == expected(PROMPT, 7, 20)


def test_the_stream_depends_on_every_token_of_the_prompt_and_on_the_seed():
    streams = {tuple(expected(PROMPT, 7, 20, ())), tuple(expected(PROMPT, 8, 20, ()))}
    for i in range(len(PROMPT)):
        streams.add(tuple(expected([*PROMPT[:i], 63, *PROMPT[i + 1 :]], 7, 20, ())))
    assert len(streams) == len(PROMPT) + 2
    assert expected([1, 2, 3], 7, 8, ()) != expected([2, 1, 3], 7, 8, ())


def test_greedy_takes_no_seed_into_account():
    assert expected(PROMPT, 7, 20, temperature=0) == expected(PROMPT, 8, 20, temperature=0)
    greedy = SamplingParams(20, temperature=0, stop_ids=EOS)
    assert Worker().generate(PROMPT, 8, greedy, list(range(9))) == expected(PROMPT, 0, 20)


def test_a_stream_goes_on_from_known_tokens():
    whole = expected(PROMPT, 7, 60, ())
    assert expected(PROMPT, 7, 60, (), known=whole[:25]) == whole[25:]


def test_streams_end_by_eos_now_and_then_and_are_valid_text_up_to_their_last_character():
    ends, wide = 0, 0
    for seed in range(200):
        stream = expected(PROMPT, seed, 100)
        ends += stream[-1] == 256
        text = bytes(t for t in stream if t < 256)
        wide += any(b >= 128 for b in text)
        text.decode() if stream[-1] == 256 else text.decode(errors="ignore")
        assert text.decode(errors="replace").rstrip("\ufffd").count("\ufffd") == 0
    assert 50 < ends < 180
    assert wide > 150


@pytest.mark.parametrize("spoil", ["wrong block", "stale content", "stolen block", "swapped order"])
def test_any_spoilt_table_changes_the_stream(spoil):
    worker = Worker()
    prompt, params = PROMPT[:10], SamplingParams(6, stop_ids=b"")
    worker.run(first_plan(1, prompt, 7, params, [0, 1, 2, 3]))
    spoiling = {
        "wrong block": rows_of(share_slots=[0], share_indices=[1], share_blocks=[7]),
        "swapped order": rows_of(share_slots=[0, 0], share_indices=[0, 1], share_blocks=[1, 0]),
    }
    step = 2
    if spoil == "stolen block":
        worker.run(first_plan(2, list(b"thief"), 9, params, [4, 2], slot=1))
        step = 3
    if spoil == "stale content":
        worker.runner.cache[1, 3] += np.uint64(1)
    result = worker.run(Plan(step, **spoiling.get(spoil, {}), **row(0, 1, 10, 1)))
    draw = expected_with_logprobs(prompt, 7, 2, ())[1]
    good = Worker()
    good.run(first_plan(1, prompt, 7, params, [0, 1, 2, 3]))
    assert unpack(good.run(Plan(2, **row(0, 1, 10, 1))).ids)[0] == draw[0]
    tokens = [unpack(result.ids)[0]]
    for position in range(11, 15):
        step += 1
        tokens.append(unpack(worker.run(Plan(step, **row(0, 1, position, 1))).ids)[0])
    assert tokens != expected(prompt, 7, 6, ())[1:]


def test_a_block_given_away_too_early_changes_what_was_copied_to_the_host():
    def run(thief_block: int) -> list[int]:
        worker = Worker()
        params = SamplingParams(8, stop_ids=b"")
        worker.run(first_plan(1, PROMPT[:7], 7, params, [0, 1]))
        worker.start(Plan(2, **rows_of(frees=[0], out_from=[0, 1], out_to=[3, 5])))
        worker.start(first_plan(3, list(b"abc"), 9, params, [thief_block], slot=1))
        worker.finish()
        worker.finish()
        back = rows_of(
            bind_slots=[0],
            bind_generations=[2],
            bind_records=[1],
            assign_slots=[0, 0, 0],
            assign_indices=[0, 1, 2],
            assign_blocks=[8, 9, 10],
            in_from=[3, 5],
            in_to=[8, 9],
        )
        tokens = unpack(worker.run(Plan(4, **back, **row(0, 2, 7, 1))).ids).tolist()
        for step in range(5, 9):
            tokens += unpack(worker.run(Plan(step, **row(0, 2, step + 3, 1))).ids).tolist()
        return tokens

    right = expected(PROMPT[:7], 7, 8, ())[1:6]
    assert run(thief_block=12) == right
    assert run(thief_block=0) != right


def test_a_stop_id_ends_the_choice_and_late_rows_of_the_slot_write_nowhere():
    stream = expected(PROMPT, 7, 20, ())
    index = next(i for i in range(1, 20) if stream[i] not in stream[:i])
    params = SamplingParams(20, stop_ids=pack([stream[index]]))
    worker = Worker()
    blocks = list(range(9))
    worker.run(first_plan(1, PROMPT, 7, params, blocks))
    for i in range(1, index + 1):
        result = worker.run(Plan(i + 1, **row(0, 1, len(PROMPT) + i - 1, 1)))
        assert result.flags[0] == (STOPPED if i == index else 0)
    before = worker.runner.cache[:-1].copy()
    late = worker.run(Plan(index + 2, **row(0, 1, len(PROMPT) + index, 1)))
    assert late.flags[0] == DEAD
    assert late.ids == b""
    assert (worker.runner.cache[:-1] == before).all()


def test_stop_ids_are_banned_before_min_tokens():
    stream = expected(PROMPT, 7, 12, ())
    stops = sorted({stream[2], 256, 32})
    params = SamplingParams(12, min_tokens=8, stop_ids=pack(stops))
    got = Worker().generate(PROMPT, 7, params, list(range(9)))
    assert got == expected(PROMPT, 7, 12, stops, min_tokens=8)
    assert len(got) > 8
    assert not set(got[:8]) & set(stops)


def test_logprobs_come_from_the_same_hash():
    params = SamplingParams(5, stop_ids=b"", logprobs=3)
    worker = Worker()
    result = worker.run(first_plan(1, PROMPT, 7, params, list(range(6))))
    ((token, pairs),) = expected_with_logprobs(PROMPT, 7, 1, (), logprobs=3)
    assert unpack(result.ids).tolist() == [token]
    assert unpack(result.lp_counts).tolist() == [4]
    assert [*zip(unpack(result.lp_ids).tolist(), unpack_floats(result.lp_values).tolist())] == pairs
    assert pairs[0] == pairs[1]
    assert sorted((value for _, value in pairs[1:]), reverse=True) == [value for _, value in pairs[1:]]
    assert unpack(result.lp_ranks).tolist() == [1]


def test_a_marked_token_raises():
    worker = Worker(marks={33: "raise"})
    with pytest.raises(StepError, match="marked"):
        worker.start(first_plan(1, [97, 33, 98], 7, SamplingParams(4), [0]))


def test_a_mark_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="'explode'"):
        Worker(marks={33: "explode"})


def test_a_nan_reaches_whoever_reads_it_and_nobody_else():
    worker = Worker(marks={33: "nan"})
    params = SamplingParams(4, stop_ids=b"")
    prompt = [*b"abcdefg", 33, *b"ij"]
    chunk = first_plan(1, prompt, 7, params, [0, 1, 2])
    assert worker.run(chunk).flags[0] == NAN
    assert worker.run(Plan(2, **row(0, 1, 10, 1))).flags[0] == DEAD
    # A neighbour that shares the first block, which is clean, is fine; one that shares the second is not.
    for step, shared, flag in ((3, 1, 0), (4, 2, NAN)):
        other = [*prompt[: 4 * shared], *b"klm"]
        columns = rows_of(
            bind_slots=[step - 2],
            bind_generations=[1],
            bind_records=[step],
            share_slots=[step - 2] * shared,
            share_indices=[*range(shared)],
            share_blocks=[*range(shared)],
            assign_slots=[step - 2],
            assign_indices=[shared],
            assign_blocks=[step + 4],
        )
        result = worker.run(
            Plan(
                step, admits=[Admit(step, pack(other), b"", 7, params)], **columns, **row(step - 2, 1, 4 * shared, len(other) - 4 * shared)
            )
        )
        assert result.flags[0] == flag


def test_a_passing_nan_stays_where_it_was_stored_and_comes_no_second_time():
    worker = Worker(marks={33: "nan_once"})
    params = SamplingParams(4, stop_ids=b"")
    prompt = [*b"abcdefg", 33, *b"ij"]
    assert worker.run(first_plan(1, prompt, 7, params, [0, 1, 2])).flags[0] == NAN
    columns = rows_of(
        bind_slots=[1],
        bind_generations=[1],
        bind_records=[2],
        share_slots=[1, 1],
        share_indices=[0, 1],
        share_blocks=[0, 1],
        assign_slots=[1],
        assign_indices=[2],
        assign_blocks=[6],
    )
    sharing = Plan(2, admits=[Admit(2, pack(prompt), b"", 7, params)], **columns, **row(1, 1, 8, 2))
    assert worker.run(sharing).flags[0] == NAN
    result = worker.run(first_plan(3, prompt, 7, params, [8, 9, 10], slot=2))
    assert (result.flags[0], unpack(result.ids).tolist()) == (0, expected(prompt, 7, 1, ()))


def drive(random: Random, count: int, **sizes: int) -> RandomPlanner:
    worker = Worker(**sizes)
    choices = [
        SamplingParams(1, stop_ids=EOS),
        SamplingParams(14, stop_ids=EOS),
        SamplingParams(14, stop_ids=pack([256, 101, 32]), min_tokens=3),
        SamplingParams(14, temperature=0, stop_ids=b"", logprobs=2),
    ]
    sequences = draw_sequences(random, count, worker.geometry, choices)
    planner = RandomPlanner(worker.geometry, sequences, random)
    everything: list[Sequence] = planner.everything
    for _ in range(3000):
        if planner.done:
            break
        worker.start(planner.next_plan())
        planner.check()
        while len(worker.steps) > random.randrange(3):
            planner.take(worker.finish())
    while worker.steps:
        planner.take(worker.finish())
    for sequence in everything:
        p = sequence.params
        stops = unpack(p.stop_ids).tolist()
        want = expected(sequence.prompt, sequence.seed, p.max_tokens, stops, p.min_tokens, temperature=p.temperature)
        assert sequence.known == want
    return planner


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_random_legal_plans_give_the_expected_streams(seed):
    drive(Random(seed), 8)


def test_random_plans_share_fork_chunk_preempt_and_swap():
    events = drive(Random(1), 60, num_gpu_blocks=24, max_num_seqs=5).events
    assert all(events[kind] > 3 for kind in ("shared", "fork", "chunk", "recompute", "swap out", "swap in")), events


def test_rows_of_one_step_may_read_what_another_row_of_it_writes_in_any_row_order():
    for order in ([0, 1], [1, 0]):
        worker = Worker()
        params = SamplingParams(4, stop_ids=b"")
        prompts = [PROMPT[:8], [*PROMPT[:8], *b"xy"]]
        columns = rows_of(
            bind_slots=[0, 1],
            bind_generations=[1, 1],
            bind_records=[0, 1],
            assign_slots=[0, 0, 1],
            assign_indices=[0, 1, 2],
            assign_blocks=[4, 5, 6],
            share_slots=[1, 1],
            share_indices=[0, 1],
            share_blocks=[4, 5],
            slots=order,
            generations=[1, 1],
            starts=[[0, 8][i] for i in order],
            counts=[[8, 2][i] for i in order],
            outputs=[1, 1],
        )
        admits = [Admit(i, pack(prompt), b"", 7, params) for i, prompt in enumerate(prompts)]
        result = worker.run(Plan(1, admits=admits, **columns))
        assert unpack(result.ids).tolist() == [expected(prompts[i], 7, 1, ())[0] for i in order]


@pytest.mark.parametrize("runner", ["oracle", "simulated"])
def test_a_worker_whose_blocks_hold_no_sequence_is_refused(runner: str) -> None:
    sizes = {"runner": runner, "block_size": 16, "max_model_len": 4096}
    with pytest.raises(LoadError, match="255 blocks hold no sequence of max_model_len, which needs 256"):
        make_runner(WorkerSettings(run_dir=Path(), num_gpu_blocks=255, **sizes), {})
    make_runner(WorkerSettings(run_dir=Path(), num_gpu_blocks=256, **sizes), {})
