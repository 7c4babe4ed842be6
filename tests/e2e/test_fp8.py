"""fp8 through the whole stack: a cache of it under the packaged model, and checkpoints of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.stack import eventually, stack
from tests.e2e.test_real_model import QUESTIONS, ask, chat
from tests.gpu_worker.fp8_checkpoints import FORMATS, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.model
def test_the_real_model_answers_over_an_fp8_cache_whatever_happens_to_its_blocks() -> None:
    """A killed worker, and scarce blocks with room to swap to, change no byte of the answers."""
    bodies = [chat(question, 90, ignore_eos=True) for question in QUESTIONS]
    with stack() as made:
        made.up("--kv-cache-dtype", "fp8")
        undisturbed = ask(made, bodies)
        assert ask(made, bodies, lambda: made.kill("worker")) == undisturbed
    scarce = ("--num-gpu-blocks", "20", "--num-cpu-blocks", "40", "--max-model-len", "256", "--preemption", "swap")
    with stack() as made:
        made.up("--kv-cache-dtype", "fp8", *scarce)
        ask(made, [chat(question, 2) for question in QUESTIONS * 3])  # teaches the scheduler to expect short answers
        assert ask(made, bodies) == undisturbed
        eventually(lambda: made.metrics().get('pagewire_scheduler_preemptions{name="scheduler-0"}', 0) > 0)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_an_fp8_checkpoint_is_served(tmp_path: Path, cache: str) -> None:
    """What it says is what its values say in float32; the offline API takes the same settings."""
    from pagewire import LLM, SamplingParams

    made = write(tmp_path, FORMATS["blocks"])
    answers = []
    for folder in (made.folder, made.plain):
        llm = LLM(str(folder), kv_cache_dtype=cache, max_model_len=128, num_gpu_blocks=40)
        try:
            prompts = ["a queue", "keys and values " * 5]
            found = llm.generate(prompts, SamplingParams(max_tokens=20, temperature=0, ignore_eos=True), use_tqdm=False)
            answers.append([list(output.outputs[0].token_ids) for output in found])
        finally:
            llm.close()
    assert answers[0] == answers[1]
    assert [len(tokens) for tokens in answers[0]] == [20, 20]
    assert answers[0][0] != answers[0][1]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config.quant_method: gptq quantised weights are not supported"),
        ({"quant_method": "fp8", "weight_block_size": [32, 32]}, "quantization_config.weight_block_size is [32, 32]"),
    ],
)
def test_other_checkpoints_end_the_worker_with_one_line(tmp_path: Path, how: dict[str, object], says: str) -> None:
    folder = write(tmp_path, FORMATS["blocks"]).folder
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": how}))
    with stack() as made:
        process = made.start("worker", "--model", str(folder), "--device", "cpu")
        assert process.popen.wait(120) == 78
        assert process.output().splitlines()[-1].startswith(f"pagewire: {says}")
