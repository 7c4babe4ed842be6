"""What a worker says when a card cannot serve: one line each, and a process that ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_worker.cuda import runner
from gpu_worker.errors import LoadError
from gpu_worker.settings import WorkerSettings
from protocol.service import EXIT_REFUSED

CARD = runner.has_card()


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
