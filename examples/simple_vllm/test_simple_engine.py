"""The small edition against transformers: python -m pytest examples/simple_vllm"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from server import app
from simple_engine import SimpleLLMEngine

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "initializer_range": 0.3,  # large enough for no two tokens to be nearly equally likely
}
PROMPTS = [[5, 6, 7], [10, 250, 31, 44, 5, 9, 12, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110], [299], [5, 6, 7, 8, 9]]


def tiny_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


def tiny_qwen3() -> Any:
    torch.manual_seed(1)
    return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **SIZES)).eval()


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def greedy(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    """What transformers generates, alone."""
    output = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=max_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
def test_a_request_is_answered_as_transformers_answers_it(make: Any) -> None:
    model = make()
    for prompt in PROMPTS:
        assert SimpleLLMEngine(model).generate(prompt, max_tokens=40) == greedy(model, prompt, 40)


def test_several_requests_share_their_steps() -> None:
    model = tiny_llama()
    engine = SimpleLLMEngine(model, max_batch_size=4)
    ids = [engine.add_request(prompt, max_tokens=10) for prompt in PROMPTS]
    finished = {}
    for step in range(10):
        assert engine.has_unfinished_requests(), step
        finished |= {request.id: request.generated for request in engine.step()}
        if step < 9:
            assert len(engine.scheduler.running) == 4
    assert not engine.has_unfinished_requests()
    assert [finished[id] for id in ids] == [greedy(model, prompt, 10) for prompt in PROMPTS]


def test_a_request_joins_a_batch_that_is_running() -> None:
    model = tiny_llama()
    engine = SimpleLLMEngine(model, max_batch_size=2)
    engine.add_request(PROMPTS[0], max_tokens=12)
    for _ in range(5):
        engine.step()
    late = engine.add_request(PROMPTS[1], max_tokens=3)
    ended = [request for _ in range(3) for request in engine.step()]
    assert [(request.id, request.generated) for request in ended] == [(late, greedy(model, PROMPTS[1], 3))]


def test_no_more_run_than_the_batch_holds() -> None:
    engine = SimpleLLMEngine(tiny_llama(), max_batch_size=2)
    for prompt in PROMPTS:
        engine.add_request(prompt, max_tokens=3)
    engine.step()
    assert len(engine.scheduler.running) == 2
    assert len(engine.scheduler.waiting) == 2


def test_the_cache_is_freed_when_requests_end() -> None:
    engine = SimpleLLMEngine(tiny_llama(), num_blocks=8, block_size=4)
    request = engine.add_request([1, 2, 3, 4, 5], max_tokens=4)
    engine.step()
    assert engine.cache.free_blocks == 6
    assert len(engine.cache.tables[request]) == 2
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.cache.free_blocks == 8
    assert engine.cache.tables == {}
    assert engine.scheduler.statistics.completed == 1
    assert engine.scheduler.statistics.average_duration > 0


def test_a_full_cache_preempts_and_changes_no_answer() -> None:
    model = tiny_llama()
    engine = SimpleLLMEngine(model, max_batch_size=4, num_blocks=9, block_size=4)
    prompts = [[i, i + 1, i + 2] for i in (1, 50, 90, 130)]
    answers = engine.generate(prompts, max_tokens=20)
    assert engine.scheduler.statistics.preemptions > 0
    assert answers == [greedy(model, prompt, 20) for prompt in prompts]
    assert engine.cache.free_blocks == 9


def test_blocks_in_any_order_give_the_same_answer() -> None:
    model = tiny_llama()
    engine = SimpleLLMEngine(model, num_blocks=12, block_size=2)
    engine.cache._free.rotate(5)
    engine.cache._free.reverse()
    assert engine.generate(PROMPTS[0], max_tokens=15) == greedy(model, PROMPTS[0], 15)


def test_an_end_token_ends_a_request() -> None:
    model = tiny_llama()
    free = greedy(model, PROMPTS[1], 20)
    model.generation_config.eos_token_id = free[7]
    assert SimpleLLMEngine(model).generate(PROMPTS[1], max_tokens=20) == free[: free.index(free[7]) + 1]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 5, "no tokens"),
        ([1], 0, "less than 1"),
        ([1] * 100, 29, "context of 128"),
        ([1] * 40, 25, "5 blocks"),
        ("text", 5, "token ids"),
        ([300], 5, "between 0 and 299"),
        ([-1], 5, "between 0 and 299"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(prompt: Any, max_tokens: int, words: str) -> None:
    engine = SimpleLLMEngine(tiny_llama(), num_blocks=4, block_size=16)
    with pytest.raises(ValueError, match=words):
        engine.add_request(prompt, max_tokens)
    assert not engine.has_unfinished_requests()


def test_the_server_answers_over_http() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    with TestClient(app(SimpleLLMEngine(model, tokenizer=tokenizer))) as client:
        answer = client.post("/generate", json={"prompt": "Hello", "max_tokens": 9})
        assert answer.status_code == 200
        expected = greedy(model, tokenizer("Hello")["input_ids"], 9)
        assert answer.json() == {"request_id": "request-0", "text": tokenizer.decode(expected), "tokens_generated": 9}
        for body, words in (
            ({"max_tokens": 3}, "prompt"),
            ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
            ({"prompt": 3}, "prompt"),
            ([], ""),
        ):
            refused = client.post("/generate", json=body)
            assert refused.status_code == 400
            assert words in refused.json()["error"]


def test_a_batch_that_nobody_fits_in_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_size"):
        SimpleLLMEngine(tiny_llama(), max_batch_size=0)


def test_a_request_that_is_nonsense_harms_no_other() -> None:
    engine = SimpleLLMEngine(tiny_llama(), tokenizer=byte_tokenizer())

    def raises(*_: Any) -> str:
        raise RuntimeError("a tokenizer's own trouble")

    with TestClient(app(engine), raise_server_exceptions=False) as client:
        for content in (b'{"prompt": "\\ud800"}', b"[" * 100_000):
            assert client.post("/generate", content=content).status_code == 400
        add, engine.add_request = engine.add_request, raises  # type: ignore[method-assign]
        assert client.post("/generate", json={"prompt": "x"}).status_code == 500
        engine.add_request = add  # type: ignore[method-assign]
        assert client.post("/generate", json={"prompt": "Hello", "max_tokens": 2}).status_code == 200
