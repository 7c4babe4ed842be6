"""Log probabilities of a prompt: what a step reports of its rows, in any chunks, beside any neighbours."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from gpu_worker.core import WorkerCore, scored
from gpu_worker.oracle import OracleRunner, expected_prompt_logprobs
from gpu_worker.prompt_scores import SLICE
from gpu_worker.settings import WorkerSettings
from gpu_worker.simulated import SimulatedRunner
from gpu_worker.slots import PlanError
from protocol.columns import pack, unpack, unpack_floats
from protocol.messages import Admit, SamplingParams, Scored
from tests.gpu_worker.model_driver import Loaded, load_tiny
from tests.gpu_worker.worker_plans import Columns

Pairs = list[tuple[int, float]]


def score(loaded: Loaded, prompts: list[list[int]], wanted: list[int], chunk: int = 8192, first: int = 1) -> list[list[tuple[Pairs, int]]]:
    """(pairs, rank) of each prompt's positions from `first` on; all prompts in one batch, in chunks of at most `chunk` tokens."""
    core = loaded.open()
    geometry = loaded.description.geometry
    blocks = loaded.random.sample(range(geometry.blocks), geometry.blocks)
    slots = loaded.random.sample(range(geometry.slots), len(prompts))
    told: list[list[tuple[Pairs, int]]] = [[] for _ in prompts]
    computed, tables = [0] * len(prompts), [0] * len(prompts)
    step = 0
    while any(computed[i] < len(prompt) - 1 for i, prompt in enumerate(prompts)):
        step += 1
        columns, rows, budget = Columns(), [], geometry.max_step_tokens
        for i, prompt in enumerate(prompts):
            count = min(len(prompt) - 1 - computed[i], chunk, budget)
            if count <= 0:
                continue
            if not computed[i]:
                params = SamplingParams(0, prompt_logprobs=wanted[i])
                columns.admits.append(Admit(i, pack(prompt), b"", 0, params))
                columns.add(bind_slots=slots[i], bind_generations=1, bind_records=i)
            while tables[i] * geometry.block_size < computed[i] + count:
                columns.add(assign_slots=slots[i], assign_indices=tables[i], assign_blocks=blocks.pop())
                tables[i] += 1
            at = max(first, computed[i] + 1)
            columns.add(slots=slots[i], generations=1, starts=computed[i], counts=count, outputs=0)
            columns.add(scores=at if at <= computed[i] + count else 0)
            computed[i] += count
            budget -= count
            rows.append(i)
        plan = columns.plan(step)
        plan.check(geometry)
        ready = core.apply(plan)
        loaded.runner.start(ready)
        outcome = loaded.runner.finish(ready)
        for message in scored(ready, outcome):
            message.check(geometry)
            take(message, told[rows[message.row]], first)
        assert len(core.result(ready, outcome).counts) == 0
    return told


def take(message: Scored, told: list[tuple[Pairs, int]], first: int) -> None:
    scores = message.scores
    assert scores.first == first + len(told), "positions come in their order"
    assert scores.count <= SLICE
    ids, values = unpack(scores.ids).tolist(), unpack_floats(scores.values).tolist()
    each = len(ids) // scores.count
    for i, rank in enumerate(unpack(scores.ranks).tolist()):
        span = slice(i * each, (i + 1) * each)
        told.append((list(zip(ids[span], values[span], strict=True)), rank))


def prompts_of(lengths: list[int], vocabulary: int) -> list[list[int]]:
    random = Random(5)
    return [[random.randrange(vocabulary) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def oracle() -> Loaded:
    runner = OracleRunner(WorkerSettings(run_dir=Path("unused"), num_gpu_blocks=64, max_num_seqs=8, max_model_len=512))
    return Loaded(runner, runner.load())


@pytest.mark.parametrize("chunk", [7, 16, 8192])
def test_chunks_and_neighbours_change_no_bit(tiny: Loaded, chunk: int) -> None:
    prompts = prompts_of([2, 40, 90, 17], 1003)
    alone = [score(tiny, [prompt], [3])[0] for prompt in prompts]
    assert score(tiny, prompts, [3] * 4, chunk) == alone


def test_each_row_reports_as_many_alternatives_as_its_own_request_wants(tiny: Loaded) -> None:
    prompts = prompts_of([12, 12, 12], 1003)
    told = score(tiny, prompts, [0, 2, 5])
    assert [{len(pairs) for pairs, _ in one} for one in told] == [{1}, {3}, {6}]
    for one, prompt in zip(told, prompts, strict=True):
        assert [pairs[0][0] for pairs, _ in one] == prompt[1:]
        for pairs, rank in one:
            values = [value for _, value in pairs[1:]]
            assert values == sorted(values, reverse=True)
            if rank <= len(values):
                assert pairs[rank] == pairs[0]


def test_what_a_journal_has_is_not_reported_again(tiny: Loaded) -> None:
    prompts = prompts_of([50], 1003)
    (whole,) = score(tiny, prompts, [2])
    assert score(tiny, prompts, [2], chunk=9, first=20) == [whole[19:]]


def test_never_more_logits_than_a_slice_exist(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.runner._step._model  # type: ignore[attr-defined]
    seen = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: seen.append(len(hidden)) or logits(hidden))
    score(tiny, prompts_of([200, 200, 150], 1003), [1, 1, 1])
    assert max(seen) == SLICE
    assert sum(seen) == 199 + 199 + 149


def test_the_oracle_tells_what_can_be_computed_beforehand(oracle: Loaded) -> None:
    prompts = prompts_of([30, 300, 2], 256)
    for chunk in (5, 8192):
        told = score(oracle, prompts, [2, 0, 4], chunk)
        assert [[pairs for pairs, _ in one] for one in told] == [
            expected_prompt_logprobs(prompt, k) for prompt, k in zip(prompts, (2, 0, 4), strict=True)
        ]


def test_the_simulated_runner_tells_as_many_as_are_asked_for() -> None:
    runner = SimulatedRunner(WorkerSettings(run_dir=Path("unused"), num_gpu_blocks=64, max_num_seqs=8, max_model_len=512))
    prompts = prompts_of([30, 9], 256)
    told = score(Loaded(runner, runner.load()), prompts, [1, 3], 8)
    assert [[pairs[0][0] for pairs, _ in one] for one in told] == [prompt[1:] for prompt in prompts]
    assert [{len(pairs) for pairs, _ in one} for one in told] == [{2}, {4}]


def test_a_plan_that_asks_for_what_no_record_wants_fails(oracle: Loaded) -> None:
    core: WorkerCore = oracle.open()
    columns = Columns(admits=[Admit(0, pack([1, 2, 3]), b"", 0, SamplingParams(1))])
    columns.add(bind_slots=0, bind_generations=1, bind_records=0, assign_slots=0, assign_indices=0, assign_blocks=0)
    columns.add(slots=0, generations=1, starts=0, counts=2, outputs=0, scores=1)
    with pytest.raises(PlanError, match="scores: slot 0 has nothing to report"):
        core.apply(columns.plan(1))
