"""The packaged model in float32 gives the tokens that transformers gives: `tests/data/make_golden.py` made the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.messages import SamplingParams
from tests.gpu_worker.model_driver import Loaded, generate, greedy, load_packaged

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(900)]
GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "golden_smollm2.json").read_text())


@pytest.fixture(scope="module")
def model() -> Loaded:
    return load_packaged("float32")


def _cases(kind: str) -> tuple[list[list[int]], list[SamplingParams], list[int], list[list[int]]]:
    entries = GOLDEN[kind]
    params = [SamplingParams(max_tokens=len(e["tokens"]), temperature=e.get("temperature", 0.0)) for e in entries]
    return [e["prompt"] for e in entries], params, [e.get("seed", 0) for e in entries], [e["tokens"] for e in entries]


def test_the_golden_file_leaves_room_for_rounding() -> None:
    assert len(GOLDEN["greedy"]) == 24
    assert all(len(e["tokens"]) == 64 and e["gap"] > 1e-3 for e in GOLDEN["greedy"] + GOLDEN["sampled"])


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_alone(model: Loaded, kind: str) -> None:
    for prompt, params, seed, tokens in zip(*_cases(kind)):
        assert generate(model, [prompt], [params], [seed]) == [tokens]


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_in_one_batch_of_mixed_lengths(model: Loaded, kind: str) -> None:
    prompts, params, seeds, tokens = _cases(kind)
    assert generate(model, prompts, params, seeds) == tokens


def test_in_chunks_of_32_beside_decodes_greedy_and_sampled_together(model: Loaded) -> None:
    both = [[*a, *b] for a, b in zip(_cases("greedy"), _cases("sampled"))]
    prompts, params, seeds, tokens = both
    assert generate(model, prompts, params, seeds, chunk=32) == tokens  # type: ignore[arg-type]


def test_packed_weights_give_the_same_tokens_alone_and_together() -> None:
    packed = load_packaged("auto")
    prompts, _, _, tokens = _cases("greedy")
    together = generate(packed, prompts, [greedy(32)] * len(prompts), [0] * len(prompts), chunk=32)
    for prompt, expected in list(zip(prompts, together))[::4]:
        assert generate(packed, [prompt], [greedy(32)], [0]) == [expected]
    same = sum(a == b for mine, theirs in zip(together, tokens) for a, b in zip(mine[:1], theirs[:1]))
    assert same >= 18, "4-bit weights in bfloat16 should rarely change the first token"
