"""The prefill attention for Hopper against float64, on a card, in 16 bits; and in the whole step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_player import Player
from tests.gpu_worker.cuda.prefill_case import KV_HEADS, PrefillCase
from tests.gpu_worker.cuda.reference import error
from tests.gpu_worker.cuda.test_engine import CONFIGS, make, prompts, teacher

if torch.cuda.is_available():
    from gpu_worker.cuda.attention_kernels import box
    from gpu_worker.cuda.driver import tensor_map
    from gpu_worker.cuda.kernels import prefill_hopper
    from gpu_worker.cuda.triton_kernel import Boxes, TritonKernel


BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [  # head dimension, query heads of a KV head, page, tile, stages, turns, programs, type
    (128, 2, 16, 64, 4, 1, 5, BF16),
    (128, 2, 16, 64, 4, 1, 5, FP16),
    (128, 4, 16, 128, 2, 1, 5, BF16),
    (64, 1, 16, 64, 2, 1, 1, BF16),
    (64, 8, 8, 128, 2, 0, 7, BF16),
    (128, 2, 256, 64, 3, 0, 100, BF16),
    (128, 16, 64, 64, 2, 1, 3, BF16),
]
Shape = tuple[int, int, int, int, int, int, int, torch.dtype]


@pytest.fixture(scope="module")
def cases() -> dict[Shape, tuple[PrefillCase, TritonKernel]]:
    """All kernels, which are compiled side by side."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper card")
    made = {}
    for shape in SHAPES:
        dim, repeat, page, tile, stages, turns, _, dtype = shape
        case = PrefillCase(dim, repeat, page, prefill_hopper.ROWS, dtype, "cuda")
        qkv = "*bf16" if dtype == BF16 else "*fp16"
        kernel = TritonKernel(
            "prefill_hopper.prefill_attention_hopper",
            [Boxes(qkv, box(page, tile)), qkv, "*i32", "*i32", "*i32", qkv, "fp32", "i32"], 90, warps=4, pdl=False,
            WIDTH=case.width, KV_HEADS=KV_HEADS, R=repeat, D=dim, PAGE=page, TILE=tile, STAGES=stages, TURNS=turns,
        )  # fmt: skip
        made[shape] = case, kernel
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_over_prefixes_match_float64(cases: dict[Shape, tuple[PrefillCase, TritonKernel]], shape: Shape) -> None:
    case, kernel = cases[shape]
    dim, _, page, tile, _, _, programs, dtype = shape
    cache = tensor_map(case.cache.data_ptr(), case.cache.numel() // dim, dim, box(page, tile))
    pointers = [t.data_ptr() for t in (case.qkv, case.table, case.tiles, case.rows, case.out)]
    outs = []
    for _ in range(20):  # a race would not show each time
        case.out.fill_(float("nan"))
        kernel(torch.cuda.current_stream().cuda_stream, (programs, 1), *cache, *pointers, case.scale, len(case.tiles))
        outs.append(case.out.clone())
    assert case.error() < (6e-3 if dtype == BF16 else 1e-3)
    assert all(torch.equal(out, case.out) for out in outs)


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2"])
def test_prompts_in_chunks_match_float64(name: str) -> None:
    config = CONFIGS[name]
    engine, source = make(config, BF16, prefill_hopper=True)
    assert engine.forward.attention.prefill_hopper is not None
    player = Player(engine, depth=1)
    texts = prompts([1, 15, 16, 17, 63, 64, 65, 129, 700, 1025], config.vocab_size)
    new = [player.add(p, 40) for p in texts]
    for some, chunk in ((new[:8], 1024), (new[8:9], 100), (new[9:], 333)):
        player.prefill(some, chunk=chunk)
        player.settle()
        want, bound = teacher(config, source, BF16, [s.prompt for s, _ in some], -1)
        assert error(engine.forward.logits[: len(some)], want) < 2 * bound
