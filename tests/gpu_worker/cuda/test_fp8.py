"""fp8 weights and an fp8 cache on the card, against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.gpu_player import Player
from gpu_worker.layers import fp8
from gpu_worker.layers.fp8 import Fp8Linear, as_factor
from gpu_worker.loading.config import ModelConfig
from gpu_worker.loading.online import ROUNDED, RoundedToFp8
from gpu_worker.loading.quantization import Quantization
from gpu_worker.loading.source import FP8_GROUP, Fp8, Shard
from tests.gpu_worker.cuda.reference import Reference, error, unrounded
from tests.gpu_worker.cuda.test_engine import CONFIGS, Noisy, prompts

if torch.cuda.is_available():
    from gpu_worker.cuda.engine import Engine
    from gpu_worker.cuda.fp8 import Fp8Products
    from gpu_worker.cuda.memory import Options
    from gpu_worker.cuda.weights import UnreadWeights

UNITS = 0.5, 0.25  # of keys and values in the cache
KINDS = ["rows", "static", "groups"]
IN_GROUPS = Quantization("weight_scale_inv", by_block=True, static=False)


def weights(n: int, k: int, kind: str) -> Fp8:
    w = torch.randn(n, k, device="cuda") * torch.rand(n, 1, device="cuda") * k**-0.5
    rounded = Fp8(*(fp8.round_groups(w) if kind == "groups" else fp8.round_rows(w)))
    made = replace(rounded, input_scale=torch.tensor(0.02, device="cuda")) if kind == "static" else rounded
    if not Fp8Linear.fits(made, torch.device("cuda")):
        pytest.skip("this card or torch does not multiply such weights")
    return made


def exact(x: torch.Tensor, made: Fp8, kind: str) -> torch.Tensor:
    """float64 of the rounded factors."""
    if kind == "groups":
        rounded = Fp8(*fp8.round_groups(x)).values()
    elif kind == "static":
        rounded = fp8.to_fp8(x.float() / 0.02).float() * 0.02
    else:
        rounded = Fp8(*fp8.round_rows(x)).values()
    return rounded.double() @ made.values().double().t()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4096, 1024), (640, 3072), (96, 256)])
@pytest.mark.parametrize("rows", [1, 3, 4, 17, 64, 300])
def test_products_are_those_of_the_rounded_factors(kind: str, shape: tuple[int, int], rows: int) -> None:
    made = weights(*shape, kind)
    x = torch.randn(rows, shape[1], device="cuda").bfloat16()
    want = exact(x, made, kind)
    assert error(Fp8Linear(made, None)(x), want) < 0.01
    factor = as_factor(made)
    padded = torch.full((-(-rows // 4) * 4, shape[1]), float("nan"), device="cuda", dtype=torch.bfloat16)
    padded[:rows] = x
    out = torch.empty(len(padded), shape[0], device="cuda", dtype=torch.bfloat16)
    products = Fp8Products([factor], torch.bfloat16, len(padded), torch.device("cuda"))
    products(torch.cuda.current_stream().cuda_stream, padded, factor, out, rows)
    torch.cuda.synchronize()
    assert error(out[:rows], want) < 0.01


def rows_rounded(x: torch.Tensor) -> torch.Tensor:
    return Fp8(*fp8.round_rows(x)).values().double()


def groups_rounded(x: torch.Tensor) -> torch.Tensor:
    """A matrix whose rows are no multiple of a group is not kept in fp8."""
    return x if x.shape[1] % FP8_GROUP else Fp8(*fp8.round_groups(x)).values().double()


def cached(kv: torch.Tensor) -> torch.Tensor:
    units = torch.tensor(UNITS, device=kv.device, dtype=kv.dtype)[:, None, None, None]
    return fp8.to_fp8((kv / units).float()).double() * units


def engine_of(config: ModelConfig, source: RoundedToFp8 | Noisy, fp8_cache: bool, **options: object) -> Engine:
    unread = UnreadWeights(source, config, torch.device("cuda"), torch.bfloat16, Shard())
    sizes = {"max_num_seqs": 32, "max_num_batched_tokens": 1024, "max_model_len": 1536, "num_blocks": 1200} | options
    units = torch.tensor([[*UNITS, 0.0, 0.0]] * config.layers, device="cuda") if fp8_cache else None
    engine = Engine(config, unread, Options(**sizes), units)
    engine.forward.attention.wait()
    engine.forward.cache.view(torch.uint8).fill_(0x7F if fp8_cache else 0xFF)  # NaN: what nobody wrote must not be read
    return engine


def play(engine: Engine, texts: list[np.ndarray], steps: int) -> tuple[list[list[int]], torch.Tensor]:
    player = Player(engine, depth=1)
    new = [player.add(p, steps + 1) for p in texts]
    player.prefill(new, chunk=100)
    player.decode([s for s, _ in new], steps)
    player.settle()
    return [list(s.tokens) for s, _ in new], engine.forward.logits[: len(texts)].clone()


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2", "smollm2"])
@pytest.mark.parametrize(
    ("weights_kind", "cache"),
    [("plain", True), *((kind, cache) for kind in ("rows", "groups") for cache in (False, True))],  # all but test_engine.py's
)
@pytest.mark.parametrize("rows", [3, 20])  # few rows' inputs are not rounded
def test_the_step_is_off_by_the_rounding(name: str, weights_kind: str, cache: bool, rows: int) -> None:
    """Logits behind the last token of prompts and five decode steps, few rows and many, eager and captured.

    They may be off by little more than float64 is where the same numbers are rounded.
    """
    plain = Noisy(CONFIGS[name], 1, torch.device("cuda"), torch.float32)
    quantization = {"plain": None, "rows": ROUNDED, "groups": IN_GROUPS}[weights_kind]
    source = plain if quantization is None else RoundedToFp8(plain, torch.device("cuda"), quantization)
    config = replace(CONFIGS[name], quantization=quantization)
    texts = prompts([5 + 31 * i for i in range(rows)], config.vocab_size)
    tokens, logits = play(engine_of(config, source, cache), texts, 5)
    full = [np.concatenate((p, t)).astype(np.int32)[:-1] for p, t in zip(texts, tokens, strict=True)]
    into = {"plain": unrounded, "rows": rows_rounded, "groups": groups_rounded}[weights_kind]
    want, rounded = (
        torch.stack([reference.logits(torch.tensor(s, device="cuda"))[-1] for s in full])
        for reference in (
            Reference(config, source, torch.float32, torch.float64),
            Reference(config, source, torch.float32, torch.float64, into=into, cached=cached if cache else unrounded),
        )
    )
    assert error(logits, want) < 1.3 * error(rounded, want)
    eager, _ = play(engine_of(config, source, cache, graphs=False), texts, 5)
    assert eager == tokens


@pytest.mark.parametrize("weights_kind", ["rows", "groups"])
def test_inputs_of_few_tokens_are_not_rounded_or_if_so_asked(weights_kind: str) -> None:
    quantization = {"rows": ROUNDED, "groups": IN_GROUPS}[weights_kind]
    source = RoundedToFp8(Noisy(CONFIGS["llama"], 1, torch.device("cuda"), torch.float32), torch.device("cuda"), quantization)
    config = replace(CONFIGS["llama"], quantization=quantization)
    reference = Reference(config, source, torch.float32, torch.float64)
    texts, errors = prompts([4, 5, 6], config.vocab_size), []  # 15 tokens, so that the prefill is of few, too
    for few_fp8 in (True, False):
        tokens, logits = play(engine_of(config, source, False, few_fp8=few_fp8, graphs=False), texts, 5)
        full = [np.concatenate((p, t)).astype(np.int32)[:-1] for p, t in zip(texts, tokens, strict=True)]
        errors.append(error(logits, torch.stack([reference.logits(torch.tensor(s, device="cuda"))[-1] for s in full])))
    assert errors[0] < errors[1] / 2
