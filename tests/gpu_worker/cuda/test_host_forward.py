"""All kernels of a whole forward pass are begun, and compile for Hopper, with a driver that is played: no card is needed.

In a process of its own: whether Triton interprets, which other tests choose, is chosen when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_worker.cuda.compiler import compile_cubin
from gpu_worker.errors import LoadError

pytest.importorskip("triton")

PROGRAM = """
from types import SimpleNamespace
import torch
import triton
from triton.backends.compiler import GPUTarget

class Driver:
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.runtime.driver.set_active(Driver())
torch.cuda.get_device_properties = lambda device: SimpleNamespace(major=9, minor=0, multi_processor_count=132)

from gpu_worker.cuda.compiler import compilers
from gpu_worker.cuda.driver import Kernel
from gpu_worker.cuda.forward import Forward
from gpu_worker.cuda.state import DeviceState
from gpu_worker.cuda.weights import LayerWeights, ModelWeights
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
angles = bf16(4096, 64), bf16(4096, 64)
weights = ModelWeights(table, table, norm, [layer])
forward = Forward(config, weights, state, bf16(1, 2, 2, 8, 16, 128), angles, prefill_hopper=True)
compilers().wait()
kernels = [kernel for kernel in vars(forward).values() if isinstance(kernel, Kernel)]
kernels += [kernel for linear in forward.linears.values() for _, kernel, _ in linear.kernels]
kernels += forward.k_decode_few.values()
attention = forward.k_decode_attention, forward.k_prefill_attention, forward.k_prefill_long, forward.k_prefill_hopper
kernels += [kernel._kernel for kernel in attention]
assert all(kernel.module._cubin().startswith(bytes([127]) + b"ELF") for kernel in kernels)
print(len(kernels), "compiled")
"""


@pytest.mark.slow
def test_all_kernels_of_a_forward_pass_compile_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_CACHE", str(tmp_path))
    try:
        compile_cubin("plan.cu", "sm_90a", {})
    except LoadError:
        pytest.skip("needs nvidia-cuda-nvrtc")
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environ |= {"PYTHONPATH": str(Path(__file__).parents[3]), "TRITON_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, timeout=300)
    assert ended.stdout == "35 compiled\n", ended.stderr
