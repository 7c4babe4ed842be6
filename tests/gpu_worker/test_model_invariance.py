"""A sequence gets the same tokens whatever runs beside it and however its blocks lie."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from protocol.columns import pack
from protocol.messages import SamplingParams
from tests.gpu_worker.model_driver import Loaded, generate, greedy, load_packaged, load_tiny, wander
from tests.gpu_worker.worker_plans import draw_sequences

SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, top_k=50)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_tiny(tmp_path_factory.mktemp("tiny"), num_cpu_blocks=20, max_num_batched_tokens=200)


@pytest.fixture(scope="module", params=["auto", "float32"])
def real(request: pytest.FixtureRequest) -> Loaded:
    return load_packaged(request.param, max_model_len=400, max_num_seqs=16, num_cpu_blocks=40, num_gpu_blocks=90)


@pytest.mark.parametrize("seed", range(4))
def test_random_plans_give_each_sequence_what_it_gets_alone(tiny: Loaded, seed: int) -> None:
    _wander_and_compare(tiny, seed, 10)


@pytest.mark.slow
@pytest.mark.model
def test_random_plans_over_the_real_model_give_each_sequence_what_it_gets_alone(real: Loaded) -> None:
    _wander_and_compare(real, 11, 10)


@pytest.mark.parametrize("block_size", [8, 48, 128])
def test_the_block_size_does_not_change_tokens(tmp_path: Path, tiny: Loaded, block_size: int) -> None:
    other = load_tiny(tmp_path, block_size=block_size)
    prompts = [[(7 * i + k) % 1003 for k in range(n)] for i, n in enumerate((1, 50, 129, 200))]
    params = [greedy(10)] * len(prompts)
    assert generate(other, prompts, params, [0] * 4) == generate(tiny, prompts, params, [0] * 4, chunk=33)


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(tiny: Loaded) -> None:
    prompts = [[5, 6, 7]] * 4
    params = [SamplingParams(max_tokens=30, temperature=1.0)] * 4
    first = generate(tiny, prompts, params, [1, 2, 1, 1 << 63])
    assert first[0] == first[2]
    assert len({tuple(tokens) for tokens in first}) == 3
    assert generate(tiny, prompts, params, [1, 2, 1, 1 << 63]) == first


def _wander_and_compare(loaded: Loaded, seed: int, n: int) -> None:
    random = Random(seed)
    penalised = SamplingParams(max_tokens=9, temperature=0.7, repetition_penalty=1.3, presence_penalty=0.5, stop_ids=pack([100]))
    sequences = draw_sequences(random, n, loaded.description.geometry, [greedy(14), SAMPLED, penalised])
    everything = [s for parent in sequences for s in (parent, *parent.children)]
    planner = wander(loaded, sequences, seed)
    assert planner.events["chunk"]
    assert planner.events["shared"]
    for s in everything:
        assert generate(loaded, [s.prompt], [s.params], [s.seed]) == [s.known], f"sequence {s.record}"
