"""The Triton kernels compile for Hopper without a card, and fit cards of less shared memory; fp8 leaves no trace where there is none of it.

In a process of its own: the interpreter, which other tests choose, is chosen when Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from gpu_worker.cuda.attention_kernels import AttentionKernels, box
from gpu_worker.cuda.build import Build
from gpu_worker.cuda.card import Card
from gpu_worker.cuda.memory import Options
from gpu_worker.loading.config import ModelConfig
from gpu_worker.cuda.triton_kernel import Boxes, source_of


def ptx(source, types, warps, **constants):
    made = source_of(source if "." in source else f"{source}.{source}", types, constants)
    return triton.compile(made, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


i, f, b, e = "*i32", "*fp32", "*bf16", "*fp8e4nv"
for dim, repeat in ((128, 2), (64, 3)):
    sizes = {"WIDTH": 256, "KV_HEADS": 8, "R": repeat, "RP": 1 << (repeat - 1).bit_length(), "D": dim, "DP": dim, "PAGE": 16}
    sizes |= {"WINDOW": 0, "SOFTCAP": 0}
    decode = sizes | {"TILE": 64, "STAGES": 2, "QK_NORM": 1, "PDL": 1}
    for cache in (b, e):
        off, scales = ({"kv_scales": None}, []) if cache == b else ({}, [f])
        given = [b, cache, i, i, b, f, f, i, b, b, f, f, "fp32", "fp32", *scales]
        for text in (
            *(
                ptx("decode_attention", given, 4, PACKED=packed, **decode, **off)
                for packed in (0, 1)
            ),
            ptx("prefill_attention", [b, cache, i, i, i, b, "fp32", *scales], 8, ROWS=128, TILE=32, STAGES=3, **sizes, **off),
        ):
            assert ("e4m3" in text) == (cache == e), (dim, cache)
for dim, repeat, page, tile in ((128, 2, 16, 64), (64, 4, 32, 128)):
    sizes = {"WIDTH": 256, "KV_HEADS": 8, "R": repeat, "D": dim, "PAGE": page, "TILE": tile, "STAGES": 2, "TURNS": 1}
    text = ptx("prefill_hopper.prefill_attention_hopper", [Boxes(b, box(page, tile)), b, i, i, i, b, "fp32", "i32"], 4, **sizes)
    assert "cp.async.bulk.tensor" in text and "wgmma.mma_async" in text
assert "e4m3x2" in ptx("round_fp8.round_rows", [b, e, f], 8, WIDTH=14336, BLOCK=2048, input_scale=None)
assert "e4m3x2" in ptx("round_fp8.round_rows", [b, e, f, f], 8, WIDTH=4096, BLOCK=2048)
assert "e4m3x2" in ptx("round_fp8.round_groups", [b, e, f], 4, WIDTH=14336, SPAN=8)

config = ModelConfig(
    family="llama", vocab_size=512, hidden=512, intermediate=512, layers=1, heads=4, kv_heads=2, head_dim=256, max_length=4096,
    norm_eps=1e-6, rope_theta=1e6, tied_embeddings=True,
)
card = Card(8, 9, 128)
kernels = AttentionKernels(Build(config, "bfloat16", False, Options(), card))
for kernel in (kernels.decode_many, *kernels.prefill_plain):
    assert kernel._kernel.shared <= card.shared, kernel._kernel.shared
import sys; assert "torch" not in sys.modules
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper_and_know_fp8_only_where_it_is(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environ |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)}
    program = tmp_path / "compile_kernels.py"  # Triton reads the source of its functions from files
    program.write_text(COMPILE)
    ended = subprocess.run([sys.executable, str(program)], env=environ, capture_output=True, text=True, timeout=300)
    assert ended.stdout == "compiled\n", ended.stderr
