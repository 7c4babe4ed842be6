"""The prefill attention for Hopper against float64, on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu_worker.cuda.attention_kernels import box
from tests.gpu_worker.cuda.host_gluon import Descriptor, launch, load_kernel
from tests.gpu_worker.cuda.prefill_case import KV_HEADS, PrefillCase

KERNEL = load_kernel(Path(__file__).parents[3] / "gpu_worker" / "cuda" / "kernels" / "prefill_hopper.py")


@pytest.mark.parametrize(
    ("dim", "repeat", "page", "tile", "stages", "turns", "programs"),
    [
        (128, 4, 16, 128, 2, 1, 5),
        pytest.param(128, 2, 16, 64, 4, 0, 5, marks=pytest.mark.slow),
        pytest.param(64, 1, 16, 64, 2, 1, 1, marks=pytest.mark.slow),
        pytest.param(64, 8, 8, 128, 2, 0, 7, marks=pytest.mark.slow),
        pytest.param(128, 2, 256, 64, 3, 1, 100, marks=pytest.mark.slow),
        pytest.param(128, 16, 64, 64, 2, 1, 3, marks=pytest.mark.slow),
    ],
)
def test_chunks_over_prefixes_match_float64(dim: int, repeat: int, page: int, tile: int, stages: int, turns: int, programs: int) -> None:
    case = PrefillCase(dim, repeat, page, KERNEL.ROWS, torch.float32)
    cache = Descriptor(case.cache.view(-1, dim), box(page, tile))
    launch(
        KERNEL.prefill_attention_hopper,
        (programs, 1),
        [cache, case.qkv, case.table, case.tiles, case.rows, case.out, case.scale, len(case.tiles)],
        WIDTH=case.width, KV_HEADS=KV_HEADS, R=repeat, D=dim, PAGE=page, TILE=tile, STAGES=stages, TURNS=turns,
    )  # fmt: skip
    assert case.error() < 2e-6
