"""What a worker says when a card cannot serve: one line each, and a process that ends."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_worker.cuda import runner
from gpu_worker.cuda.memory import Options, blocks_that_fit
from gpu_worker.errors import LoadError
from gpu_worker.loading.config import ModelConfig
from gpu_worker.settings import WorkerSettings
from protocol.service import EXIT_REFUSED

LLAMA_8B = ModelConfig(
    family="llama", vocab_size=128256, hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
    max_length=131072, norm_eps=1e-5, rope_theta=5e5,
)  # fmt: skip
GIB = 1 << 30
CARD = runner.has_card()


def test_blocks_fill_what_is_left_beside_weights_and_buffers() -> None:
    blocks = blocks_that_fit(LLAMA_8B, Options(), 2, 2, free=64 * GIB, total=80 * GIB)
    used = blocks * 2 * (32 * 2 * 8 * 16 * 128)
    assert 53 * GIB < used < 56 * GIB  # 8 GiB stay unused, some 1.5 are buffers
    in_fp8 = blocks_that_fit(LLAMA_8B, Options(), 2, 1, free=64 * GIB, total=80 * GIB)
    assert 1.99 < in_fp8 / blocks < 2.01
    smaller = blocks_that_fit(LLAMA_8B, replace(Options(), max_num_batched_tokens=16384), 2, 2, 64 * GIB, 80 * GIB)
    assert smaller < blocks


def test_a_card_without_room_for_one_sequence_says_what_helps() -> None:
    options = Options(max_model_len=131072, max_num_seqs=8)
    with pytest.raises(LoadError, match=r"8192 blocks of 2048 KiB are needed .* lower --max-model-len") as refused:
        blocks_that_fit(LLAMA_8B, options, 2, 2, free=20 * GIB, total=80 * GIB)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(CARD, reason="there is a card")
def test_a_missing_driver_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no NVIDIA driver .* --device cpu"):
        runner.CudaRunner(WorkerSettings(tmp_path, device="cuda")).load()


@pytest.mark.skipif(CARD, reason="there is a card")
def test_a_torch_that_cannot_use_the_card_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "has_card", lambda: True)
    with pytest.raises(LoadError, match=r"torch (with CUDA|finds no usable GPU)"):
        runner.CudaRunner(WorkerSettings(tmp_path, device="cuda")).load()


def ended(tmp_path: Path, *options: str) -> tuple[int, list[str]]:
    """Exit code of a worker, and what it says on stderr beside its log."""
    command = [sys.executable, "-P", "-m", "gpu_worker", "--run-dir", str(tmp_path / "run"), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return result.returncode, [line for line in result.stderr.splitlines() if line.startswith("pagewire:") or "Traceback" in line]


@pytest.mark.slow
def test_a_worker_ends_with_one_line_for_what_it_cannot_serve(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {"architectures": ["MambaForCausalLM"], "vocab_size": 300}
    (model / "config.json").write_text(json.dumps(config))
    device = () if CARD else ("--device", "cpu")
    code, (line,) = ended(tmp_path, "--model", str(model), *device)
    assert code == EXIT_REFUSED
    assert "MambaForCausalLM is not supported" in line

    tiny = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(tiny))
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"\xff" * 100)
    code, (line,) = ended(tmp_path, "--model", str(model), *device)
    assert code == EXIT_REFUSED
    assert "cannot read the weights in" in line
