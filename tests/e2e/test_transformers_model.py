"""A GPT-2 with random weights through the whole stack: its text is what transformers generates, also after a worker's death."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.stack import Stack, Streamed, eventually, stack, stream_completion

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WORDS = [*"abcdefghijklmnopqrstuvwxyz", *(f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr")]
PROMPTS = ("a b c d e f g", "ak bl cm " * 12, "z", "q w e r t y " * 5)


def _made(folder: Path) -> tuple[Any, Any]:
    """A model and the tokenizer of its words, in one folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(4)
    vocabulary = {word: i for i, word in enumerate(["<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary), n_embd=64, n_layer=3, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05 if len(parameter) == len(vocabulary) else 0.3)
    model.save_pretrained(folder)
    return model, tokenizer


def _scores(model: Any, ids: list[int]) -> list[float]:
    """Log probabilities of a prompt's tokens from the second on."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(1)
    return [float(logits[i, token]) for i, token in enumerate(ids[1:])]


def test_streams_are_what_transformers_generates_though_the_worker_is_killed(tmp_path: Path) -> None:
    model, tokenizer = _made(tmp_path)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        made = model.generate(ids, max_new_tokens=150, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(made.tolist(), skip_special_tokens=False).split())
    assert len({word for words in expected for word in words}) > 10, "a model that says one thing proves little"
    bodies = [{"prompt": p, "max_tokens": 150, "temperature": 0, "ignore_eos": True, "skip_special_tokens": False} for p in PROMPTS]
    with stack() as made:
        made.up("--model", str(tmp_path), "--num-gpu-blocks", "40", "--max-model-len", "256", "--device", "cpu")
        scored = httpx.post(
            f"{made.url}/v1/completions", json={"prompt": PROMPTS[1], "max_tokens": 0, "echo": True, "logprobs": 1}, timeout=60
        ).json()
        told = scored["choices"][0]["logprobs"]["token_logprobs"]
        assert told[1:] == pytest.approx(_scores(model, tokenizer.encode(PROMPTS[1]).ids), abs=1e-4)
        assert any(_killed_amidst(made, bodies, expected) for _ in range(5)), "the streams were over before the fault, each time"


def _killed_amidst(made: Stack, bodies: list[dict[str, Any]], expected: list[list[str]]) -> bool:
    """Kill the worker under streams, which say all the same what is expected; whether any still ran then."""
    answers = [Streamed() for _ in bodies]
    threads = [
        threading.Thread(target=stream_completion, args=(made.url, body), kwargs={"timeout": 150, "seen": seen}, daemon=True)
        for body, seen in zip(bodies, answers)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: sum(answer.chunks for answer in answers) > 40)
    made.kill("worker")
    amidst = any(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(150)
    assert [(answer.error, answer.done) for answer in answers] == [(None, 1)] * len(answers)
    assert [answer.texts.get(0, "").split() for answer in answers] == expected
    return amidst
