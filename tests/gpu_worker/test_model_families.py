"""Every supported family, rotary scaling and storage gives transformers' logits, from the files that transformers writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_worker.attention.interface import CacheShape, Rows, new_cache
from gpu_worker.attention.torch_backend import TorchAttention
from gpu_worker.loading.model_files import open_model
from gpu_worker.loading.source import Shard
from gpu_worker.models.llama import Llama
from gpu_worker.models.weights import CpuMaker, DenseMaker, LinearMaker, load_weights
from gpu_worker.settings import WorkerSettings

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": [3, 5],
    "bos_token_id": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
CASES = {
    "llama": ("Llama", {}),
    "llama with biases, tied": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama, linear scaling": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}),
    "llama, llama3 scaling": (
        "Llama",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 500000.0,
            },
        },
    ),
    "llama, yarn with weights of its magnitude": ("Llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "llama, yarn without a magnitude": ("Llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "llama, yarn with half of the weights": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.7}}),
    "llama, yarn with its magnitude": (
        "Llama",
        {"rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5, "attention_factor": 0.9}},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral with a window": ("Mistral", {"sliding_window": 25}),
    "qwen2": ("Qwen2", {}),
    "qwen2, yarn": (
        "Qwen2",
        {"rope_parameters": {**YARN, "rope_theta": 1e6}},
    ),
    "qwen3": ("Qwen3", {"head_dim": 48, "tie_word_embeddings": True}),
    "qwen3 with biases": ("Qwen3", {"head_dim": 32, "attention_bias": True}),
}


def _save(folder: Path, family: str, extra: dict[str, object]) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **extra})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # biases and norms start as zeros and ones, which would hide a mistake
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    return model


def _logits(folder: Path, ids: list[int], maker: LinearMaker) -> torch.Tensor:
    files = open_model(WorkerSettings(run_dir=folder, model=str(folder)))
    config = files.config
    shape = CacheShape(config.layers, 8, config.kv_heads, 16, config.head_dim)
    attention = TorchAttention(new_cache(shape, CPU, torch.float32), shape, config.heads, config.layer_scoring())
    model = Llama(config, load_weights(config, files.tensors(CPU, torch.float32), maker), 128, CPU)
    half = len(ids) // 2
    outputs = []
    for start, stop in ((0, half), (half, len(ids))):  # the second half attends to cached keys of the first
        rows = Rows(
            np.array([start], np.int32), np.array([stop - start], np.int32), np.arange(8, dtype=np.int32)[None, ::-1], np.zeros(1, bool)
        )
        attention.begin(rows)
        positions = torch.arange(start, stop)
        hidden = model.forward(torch.tensor(ids[start:stop]), positions, torch.arange(stop - start), attention, lambda: None)
        outputs.append(model.logits(hidden))
    return torch.cat(outputs)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    family, extra = CASES[case]
    reference = _save(tmp_path, family, extra)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "not sharded"
    ids = torch.randint(0, 120, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
        for maker in (CpuMaker(packed=False), DenseMaker(CPU, torch.float32)):
            assert torch.allclose(_logits(tmp_path, ids, maker), expected, atol=2e-4, rtol=1e-4)


def test_two_ranks_hold_together_what_one_holds(tmp_path: Path) -> None:
    _save(tmp_path, "Qwen2", {})
    files = open_model(WorkerSettings(run_dir=tmp_path, model=str(tmp_path)))
    source, maker = files.tensors(CPU, torch.float32), DenseMaker(CPU, torch.float32)
    whole, *ranks = (load_weights(files.config, source, maker, shard).layers[1] for shard in (Shard(), Shard(0, 2), Shard(1, 2)))
    x = torch.randn(3, 64)
    q, k, v = whole.qkv(x).split((64, 32, 32), dim=1)
    parts = [rank.qkv(x).split((32, 16, 16), dim=1) for rank in ranks]
    for complete, halves in zip((q, k, v), zip(*parts)):
        assert torch.allclose(torch.cat(halves, dim=1), complete, atol=1e-5)
    wide = torch.randn(3, 96)
    halves = wide.split(48, dim=1)
    assert torch.allclose(ranks[0].down(halves[0]) + ranks[1].down(halves[1]), whole.down(wide), atol=1e-5)
    gate_up = torch.cat([rank.gate_up(x).view(3, 2, 48) for rank in ranks], dim=2).view(3, 192)
    assert torch.allclose(gate_up, whole.gate_up(x), atol=1e-5)
