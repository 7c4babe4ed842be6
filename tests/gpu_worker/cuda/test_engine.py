"""The whole step on the card against float64, through the real WorkerCore."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.gpu_player import Player, Sequence
from gpu_worker.loading.config import ModelConfig, RopeScaling
from gpu_worker.loading.dummy import DummyTensors
from gpu_worker.loading.source import Shard
from gpu_worker.runner import Description
from tests.gpu_worker.cuda.reference import Reference, error
from tests.gpu_worker.model_driver import Loaded
from tests.gpu_worker.test_prompt_scores import score

if torch.cuda.is_available():
    from gpu_worker.cuda.engine import Engine
    from gpu_worker.cuda.graphs import likely_shapes
    from gpu_worker.cuda.memory import Options
    from gpu_worker.cuda.weights import UnreadWeights

QWEN3 = ModelConfig(
    family="qwen3", vocab_size=2048, hidden=512, intermediate=768, layers=3, heads=8, kv_heads=4, head_dim=128, max_length=4096,
    norm_eps=1e-6, rope_theta=1e6, tied_embeddings=True, qk_norm=True,
)  # fmt: skip
LLAMA = replace(
    QWEN3, family="llama", heads=8, kv_heads=2, norm_eps=1e-5, tied_embeddings=False, qk_norm=False,
    rope_scaling=RopeScaling("llama3", 8.0, 256, 1.0, 4.0),
)  # fmt: skip
QWEN2 = replace(LLAMA, family="qwen2", qkv_bias=True, rope_scaling=None)
SMALL = replace(LLAMA, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, tied_embeddings=True, rope_scaling=None)
MISTRAL = replace(LLAMA, family="mistral", rope_scaling=None, sliding_window=100)
D96 = replace(LLAMA, hidden=384, heads=4, kv_heads=4, head_dim=96, rope_scaling=None)
D256 = replace(QWEN3, heads=4, kv_heads=2, head_dim=256)
CONFIGS = {"qwen3": QWEN3, "llama": LLAMA, "qwen2": QWEN2, "smollm2": SMALL, "mistral": MISTRAL, "d96": D96, "d256": D256}


class Noisy(DummyTensors):
    """Dummy weights whose norms and biases are not trivial."""

    def vector(self, name: str) -> torch.Tensor:
        v = super().vector(name)
        generator = torch.Generator(v.device).manual_seed(len(name) + sum(name.encode()))
        return v + 0.3 * torch.randn(v.shape, generator=generator, device=v.device, dtype=v.dtype)


def make(config: ModelConfig, dtype: torch.dtype, **options: object) -> tuple[Engine, Noisy]:
    source = Noisy(config, 1, torch.device("cuda"), torch.float32)
    unread = UnreadWeights(source, config, torch.device("cuda"), dtype, Shard())
    sizes = {"max_num_seqs": 32, "max_num_batched_tokens": 1024, "max_model_len": 1536, "num_blocks": 1200} | options
    engine = Engine(config, unread, Options(**sizes))
    engine.forward.attention.wait()
    engine.forward.cache.fill_(float("nan"))  # what nobody wrote must not be read
    return engine, source


def prompts(lengths: list[int], vocab: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, vocab, n, dtype=np.int32) for n in lengths]


def teacher(config: ModelConfig, source: Noisy, dtype: torch.dtype, sequences: list[np.ndarray], at: int) -> tuple[torch.Tensor, float]:
    """float64 logits behind position `at` from the end, and torch's own error in `dtype`."""
    exact, rounded = (Reference(config, source, dtype, d) for d in (torch.float64, dtype))
    want = torch.stack([exact.logits(torch.tensor(s, device="cuda"))[at] for s in sequences])
    return want, error(torch.stack([rounded.logits(torch.tensor(s, device="cuda"))[at] for s in sequences]), want)


@pytest.mark.parametrize(
    ("name", "dtype", "few"),
    [
        *((name, torch.bfloat16, few) for name in CONFIGS for few in (True, False)),
        # float32 never takes the kernel for few tokens, and a head of it must fit a warp
        *((name, torch.float32, True) for name, config in CONFIGS.items() if config.head_dim <= 128),
    ],
)
def test_prefill_in_chunks_and_decode_match_float64(name: str, dtype: torch.dtype, few: bool) -> None:
    config = CONFIGS[name]
    engine, source = make(config, dtype, few=few)
    player = Player(engine, depth=1)
    texts = prompts([1, 15, 16, 17, 63, 64, 65, 129, 700, 1025], config.vocab_size)
    new = [player.add(p, 40) for p in texts]
    seqs = [s for s, _ in new]
    player.prefill(new[:8])
    player.settle()
    want, bound = teacher(config, source, dtype, texts[:8], -1)
    assert error(engine.forward.logits[:8], want) < 2 * bound
    for pair in new[8:]:
        player.prefill([pair], chunk=100)
    player.settle()
    for steps in range(3):  # eager, captured, replayed
        player.decode(seqs, 1)
        player.settle()
        full = [np.concatenate((p, s.tokens)).astype(np.int32)[:-1] for p, s in zip(texts, seqs, strict=True)]
        want, bound = teacher(config, source, dtype, full, -1)
        assert error(engine.forward.logits[:10], want) < 2 * bound, steps
        best = engine.forward.logits[:10].float().argmax(1).tolist()
        assert [s.tokens[-1] for s in seqs] == best


@pytest.mark.parametrize("rows", [1, 3, 9, 20])
def test_graphs_change_no_bit(rows: int) -> None:
    tokens = []
    for graphs in (True, False):
        engine, _ = make(QWEN3, torch.bfloat16, graphs=graphs)
        player = Player(engine)
        new = [player.add(p, 30, temperature=0.7, seed=i) for i, p in enumerate(prompts([40 + 37 * i for i in range(rows)], 2048))]
        player.prefill(new)
        player.decode([s for s, _ in new], 29)
        player.settle()
        tokens.append([s.tokens for s, _ in new])
    assert tokens[0] == tokens[1]
    assert all(len(t) == 30 for t in tokens[0])


def test_graphs_captured_while_idle_change_no_bit_and_are_given_up_for_what_arrives() -> None:
    tokens = []
    for idle in (True, False):
        engine, _ = make(QWEN3, torch.bfloat16, capture_idle=idle)
        player = Player(engine)
        if idle:
            assert engine.idle(lambda: True)
            assert engine.graphs.captured == []
        while engine.idle(lambda: False):
            pass
        new = [player.add(p, 30, temperature=0.7, seed=i) for i, p in enumerate(prompts([20, 40, 90], 2048))]
        for i, pair in enumerate(new):
            player.send([*((s, 1) for s, _ in new[:i]), (pair[0], len(pair[0].prompt))], [pair])
        player.decode([s for s, _ in new], 20)
        player.settle()
        tokens.append([s.tokens for s, _ in new])
        assert len(engine.graphs.captured) >= (len(likely_shapes(engine.geometry)) if idle else 1)
    assert tokens[0] == tokens[1]


def test_a_dead_slot_runs_on_without_tokens_and_leaves_its_blocks_alone() -> None:
    engine, _ = make(QWEN3, torch.bfloat16)
    player = Player(engine, depth=1)
    text = prompts([50], 2048)[0]
    first = player.add(text, 20)
    player.prefill([first])
    player.decode([first[0]], 6)
    player.settle()
    stop = first[0].tokens[4]
    before = first[0].tokens.index(stop)
    again = player.add(text, 20, stop_ids=np.array([7, stop], np.int32).tobytes())
    other = player.add(text, 20)
    player.prefill([again, other])
    player.decode([again[0], other[0]], 8)
    player.settle()
    assert again[0].tokens == first[0].tokens[: before + 1]
    assert len(other[0].tokens) == 9
    assert other[0].tokens[:7] == first[0].tokens


def test_a_nan_is_flagged_and_gives_no_token() -> None:
    engine, _ = make(QWEN3, torch.bfloat16)
    player = Player(engine, depth=1)
    new = [player.add(p, 20) for p in prompts([50, 60], 2048)]
    player.prefill(new)
    player.settle()
    engine.forward.cache[:, new[0][0].blocks[0]] = float("nan")
    player.decode([s for s, _ in new], 1)
    step, _ = player.flight[0] if player.flight else (None, None)
    player.settle()
    assert step is None
    assert [len(s.tokens) for s, _ in new] == [1, 2]


def test_long_and_short_sequences_share_a_step() -> None:
    config = QWEN3
    engine, source = make(config, torch.bfloat16, max_model_len=4096, num_blocks=2000, max_num_seqs=16)
    player = Player(engine, depth=1)
    texts = prompts([4000, 3, 2500, 64, 1000], config.vocab_size)
    new = [player.add(p, 20) for p in texts]
    player.prefill(new)
    for _ in range(3):
        player.decode([s for s, _ in new], 1)
    player.settle()
    full = [np.concatenate((p, s.tokens)).astype(np.int32)[:-1] for p, (s, _) in zip(texts, new, strict=True)]
    want, bound = teacher(config, source, torch.bfloat16, full, -1)
    assert error(engine.forward.logits[:5], want) < 2 * bound


def test_draws_are_those_of_the_host_s_sampler() -> None:
    from gpu_worker.runner import Record
    from gpu_worker.sampler import Sampler

    engine, _ = make(QWEN3, torch.bfloat16)
    player = Player(engine, depth=1)
    new = [player.add(p, 20, temperature=0.3 + 0.2 * i, seed=(i << 40) + 7) for i, p in enumerate(prompts([30, 40, 50, 60, 70], 2048))]
    player.prefill(new)
    player.settle()
    sampler = Sampler(32, 2048, torch.device("cuda"))
    for i, (s, admit) in enumerate(new):
        sampler.bind(i, Record(i, s.prompt, np.zeros(0, np.int32), admit.seed, admit.params, 1536))
    for _ in range(8):
        player.decode([s for s, _ in new], 1)
        player.settle()
        positions = np.array([len(s.prompt) + len(s.tokens) - 1 for s, _ in new], np.int32)
        want = sampler.sample(engine.forward.logits[:5].float(), np.arange(5, dtype=np.int32), positions)
        assert [s.tokens[-1] for s, _ in new] == want.tokens.tolist()


def test_a_row_with_filters_beside_plain_ones() -> None:
    engine, _ = make(QWEN3, torch.bfloat16)
    player = Player(engine)
    texts = prompts([30, 40, 50], 2048)
    plain = [player.add(p, 12) for p in texts]
    player.prefill(plain)
    player.decode([s for s, _ in plain], 11)
    best_only = player.add(texts[0], 12, temperature=1.0, top_k=1)
    beside = [player.add(p, 12, logprobs=2 * i - 1) for i, p in enumerate(texts[1:])]
    player.prefill([best_only, *beside])
    player.decode([best_only[0], *(s for s, _ in beside)], 11)
    player.settle()
    assert [s.tokens for s, _ in (best_only, *beside)] == [s.tokens for s, _ in plain]


def test_blocks_go_to_the_host_and_back() -> None:
    from gpu_worker.runner import Step
    from protocol.columns import EMPTY, pack
    from protocol.messages import Plan

    engine, _ = make(SMALL, torch.bfloat16, host_blocks=8)
    cache = engine.forward.cache
    cache.normal_()
    want = cache[:, [3, 900]].clone()

    def copies(number: int, **columns: list[int]) -> None:
        plan = Plan(step=number, **{k: pack(v) for k, v in columns.items()})
        engine.start(Step(plan, [], *[EMPTY] * 8, [], EMPTY, []))

    copies(1, out_from=[3, 900], out_to=[7, 2])
    copies(2, copy_from=[900], copy_to=[5], in_from=[2, 7], in_to=[10, 11])
    assert engine.finish().copied == 1
    assert engine.finish().copied == 2
    assert torch.equal(cache[:, [11, 10, 5]], torch.cat((want, want[:, 1:]), 1))


def test_mixed_steps_of_a_captured_size_match_float64() -> None:
    engine, source = make(QWEN3, torch.bfloat16)
    player = Player(engine, depth=1)
    running: list[Sequence] = []
    for n, text in enumerate(prompts([40, 33, 47, 21, 30, 44], QWEN3.vocab_size)):
        new = player.add(text, 20)
        player.send([*((s, 1) for s in running), (new[0], len(text))], [new])
        player.settle()
        running.append(new[0])
        full = [np.concatenate((s.prompt, s.tokens)).astype(np.int32)[:-1] for s in running]
        want, bound = teacher(QWEN3, source, torch.bfloat16, full, -1)
        assert error(engine.forward.logits[: n + 1], want) < 2 * bound, n
        assert [s.tokens[-1] for s in running] == engine.forward.logits[: n + 1].float().argmax(1).tolist()
    assert any(shape.tokens for shape in engine.graphs.captured)


class EngineRunner:
    """An engine as a Runner."""

    def __init__(self, engine: Engine) -> None:
        self.counter = 0
        self.load = lambda: Description("m", b"", engine.geometry, "cuda", [])
        self.start, self.reset = engine.start, engine.reset
        self.finish = lambda step: engine.finish()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [1024, 100])
def test_log_probabilities_of_prompts_are_those_of_float64(dtype: torch.dtype, bound: float, chunk: int) -> None:
    engine, source = make(QWEN3, dtype)
    runner = EngineRunner(engine)
    texts = prompts([2, 17, 300, 700], QWEN3.vocab_size)
    exact = Reference(QWEN3, source, dtype, torch.float64)
    for text, told in zip(texts, score(Loaded(runner, runner.load()), [t.tolist() for t in texts], [5] * 4, chunk), strict=True):
        want = exact.logits(torch.tensor(text, device="cuda")).log_softmax(-1).cpu().numpy()
        assert len(told) == len(text) - 1
        for position, (pairs, _) in enumerate(told):
            assert max(abs(value - want[position, id]) for id, value in pairs) < bound
