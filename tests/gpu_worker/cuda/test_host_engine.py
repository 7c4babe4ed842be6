"""A whole engine on a card that is played: every kernel compiles for Hopper, and all that is enqueued is enqueued. No card is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_worker.cuda.compiler import compile_cubin
from gpu_worker.errors import LoadError

pytest.importorskip("triton")

KERNELS = """
import torch
from tests.gpu_worker.cuda.played_card import Card
Card()

from gpu_worker.cuda.build import Build
from gpu_worker.cuda.card import Card
from gpu_worker.cuda.compiler import compilers
from gpu_worker.cuda.driver import Kernel
from gpu_worker.cuda.forward import Forward
from gpu_worker.cuda.kernels_of import Kernels
from gpu_worker.cuda.memory import Options
from gpu_worker.cuda.state import DeviceState
from gpu_worker.cuda.weights import LayerWeights, ModelWeights, UnreadWeights
from gpu_worker.loading.config import ModelConfig
from protocol.messages import Geometry

config = ModelConfig(
    family="qwen3", vocab_size=151936, hidden=1024, intermediate=3072, layers=1, heads=16, kv_heads=8, head_dim=128, max_length=4096,
    norm_eps=1e-6, rope_theta=1e6, qk_norm=True, tied_embeddings=True,
)
meta = torch.device("meta")

def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device=meta)

norm = bf16(1024)
layer = LayerWeights(norm, bf16(4096, 1024), None, bf16(128), bf16(128), bf16(1024, 2048), None, norm, bf16(6144, 1024), bf16(1024, 3072))
table = bf16(151936, 1024)
state = DeviceState(Geometry(16, 1, 0, 256, 4096, 8192, 151936), meta, 33, 64, pack=8)
class Weights(UnreadWeights):
    def read(self):
        return ModelWeights(table, table, norm, [layer])

unread = Weights(None, config, meta, torch.bfloat16, None)
begun = Kernels(Build(config, "bfloat16", False, Options(filter_kernel=False), Card(9, 0, 132)))
forward = Forward(begun, unread, state, bf16(1, 2, 2, 8, 16, 128), (bf16(4096, 64), bf16(4096, 64)))
compilers().wait()
kernels = [kernel for kernel in vars(begun.step).values() if isinstance(kernel, Kernel)]
kernels += [kernel for linear in forward.linears.values() for _, kernel, _ in linear.kernels]
attention = forward.attention
kernels += begun.attention.decode_few.values()
kernels += [kernel._kernel for kernel in (begun.attention.decode_many, attention.prefill_hopper, *begun.attention.prefill_plain)]
assert all(kernel.module._cubin().startswith(bytes([127]) + b"ELF") for kernel in kernels)
print(len(kernels))
"""

ENGINE = """
import time
import numpy as np
import torch
from tests.gpu_worker.cuda.played_card import Card
card = Card()

from dataclasses import replace
from benchmarks.gpu_player import Player
from gpu_worker.cuda import fp8 as products
from gpu_worker.cuda.engine import Engine
from gpu_worker.cuda.memory import Options
from gpu_worker.cuda.weights import UnreadWeights
from gpu_worker.loading.config import ModelConfig
from gpu_worker.layers.fp8 import Fp8Linear
from gpu_worker.loading.dummy import DummyTensors
from gpu_worker.loading.online import ROUNDED, RoundedToFp8
from gpu_worker.loading.source import Shard

config = ModelConfig(
    family="qwen3", vocab_size=2048, hidden=512, intermediate=768, layers=2, heads=8, kv_heads=4, head_dim=128, max_length=1024,
    norm_eps=1e-6, rope_theta=1e6, qk_norm=True, tied_embeddings=True,
)
cpu, dtype = torch.device("cpu"), torch.bfloat16
source, units = DummyTensors(config, 1, cpu, dtype), None
if FP8:
    config, source, units = replace(config, quantization=ROUNDED), RoundedToFp8(source, cpu), torch.ones(config.layers, 4)
    Fp8Linear.fits = lambda weights, device: True
    products.multiply = lambda *factors: None
unread = UnreadWeights(source, config, cpu, dtype, Shard())
engine = Engine(config, unread, Options(max_num_seqs=32, max_num_batched_tokens=1024, max_model_len=1024, num_blocks=BLOCKS), units)
assert bool(engine.forward.weights.fp8_linears) == FP8
assert engine.forward.cache.shape[1] == engine.geometry.blocks + 1
assert card.calls["cuLaunchKernelEx"], "the largest step"
player = Player(engine)
params = {"temperature": 1.0, "top_p": 0.9}
new = [player.add(np.arange(20, dtype=np.int32), 99, **(params if i % 2 else {})) for i in range(12)]
player.prefill(new)
player.decode([sequence for sequence, _ in new], 80)  # more than the rings have entries
player.settle()
while engine.idle(lambda: False):
    time.sleep(0.01)  # as a worker waits for messages in between
assert set(engine.graphs.captured) >= set(engine._likely)
print(engine.geometry.blocks)
"""


def printed(program: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a program prints."""
    monkeypatch.setenv("PAGEWIRE_CACHE", str(cache))
    try:
        compile_cubin("plan.cu", "sm_90a", {})
    except LoadError:
        pytest.skip("needs nvidia-cuda-nvrtc")
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [environ.get("PYTHONPATH")])])
    environ |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    ended = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_all_kernels_of_a_forward_pass_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(KERNELS, tmp_path, monkeypatch) == "35\n"


UNKNOWN = """
import gpu_worker.cuda.triton_kernel as triton_kernel
compile = triton_kernel._compile

def of_another_version(source, *arguments):
    if source == "prefill_hopper.prefill_attention_hopper":
        raise RuntimeError("no such word")
    return compile(source, *arguments)

triton_kernel._compile = of_another_version
"""


@pytest.mark.slow
def test_a_triton_that_does_not_know_gluon_as_it_was_serves_by_the_other_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, rest = KERNELS.split("from gpu_worker.cuda.build", 1)
    rest = rest.replace("attention.prefill_hopper, ", "")
    rest = rest.replace(
        "attention = forward.attention\n", "attention = forward.attention\nattention.wait()\nassert attention.prefill_hopper is None\n"
    )
    assert printed(f"{begin}{UNKNOWN}from gpu_worker.cuda.build{rest}", tmp_path, monkeypatch) == "34\n"


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "fp8"), [(0, False), (1200, False), (1200, True)])
def test_an_engine_runs_its_largest_step_with_one_block_and_loads_nothing_within_a_capture(
    asked: int, fp8: bool, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.getbasetemp() / "kernels"
    blocks = int(printed(f"BLOCKS, FP8 = {asked}, {fp8}\n{ENGINE}", cache, monkeypatch))
    block, left = 2 * 2 * 4 * 16 * 128 * 2, (int(0.9 * 4 * 2**30) - 2**30 - 2**29 - (256 << 20))
    assert blocks == (asked or left // block)
