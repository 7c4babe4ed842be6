"""A worker's memory on a card: the cache takes what the largest step leaves, and nothing that comes later needs more."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpu_worker.errors import LoadError
from gpu_worker.loading.dummy import DummyTensors
from gpu_worker.loading.source import Shard
from gpu_worker.settings import WorkerSettings
from gpu_worker.worst_case import worst_step
from protocol.messages import Geometry

if torch.cuda.is_available():
    from gpu_worker.cuda.engine import Engine
    from gpu_worker.cuda.memory import Options
    from gpu_worker.cuda.weights import UnreadWeights
    from gpu_worker.torch_step import TorchStep
    from tests.gpu_worker.cuda.test_engine import QWEN3

SPAN = 6 << 30  # bytes of the card that a test works in: the rest is taken as somebody else's


def made(**options: object) -> Engine:
    """An engine with the vocabulary of a real model, of which sampling's memory is made."""
    config = replace(QWEN3, vocab_size=151936)
    device = torch.device("cuda")
    unread = UnreadWeights(DummyTensors(config, 1, device, torch.bfloat16), config, device, torch.bfloat16, Shard())
    engine = Engine(config, unread, Options(**{"max_model_len": 1024, **options}))  # type: ignore[arg-type]
    engine.forward.attention.wait()
    return engine


def in_use() -> int:
    """Bytes of the card, whoever has them."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def share(extra: int) -> float:
    """The utilization that allows so many bytes more than are in use."""
    gc.collect()  # an engine refers to itself
    torch.cuda.empty_cache()
    return (in_use() + extra) / torch.cuda.mem_get_info()[1]


@pytest.mark.parametrize("filter_kernel", [False, True])
def test_the_largest_step_and_all_likely_graphs_stay_under_the_utilization(filter_kernel: bool) -> None:
    utilization = share(SPAN)
    limit = utilization * torch.cuda.mem_get_info()[1]
    engine = made(utilization=utilization, filter_kernel=filter_kernel)
    started = in_use()
    while engine.idle(lambda: False):
        pass
    graphs = in_use() - started
    for _ in range(3):
        engine.start(worst_step(engine.geometry))
        engine.finish()
    used = in_use()
    print(f"{len(engine.graphs.captured)} graphs: {graphs >> 20} MiB; {used >> 20} of {int(limit) >> 20} MiB in use")
    assert used <= limit
    assert used > limit - (1 << 30), "the cache leaves a lot"


def test_too_small_a_share_is_refused_in_one_line() -> None:
    with pytest.raises(LoadError, match=r"not enough memory on the card: .* raise --gpu-memory-utilization") as refused:
        made(utilization=share(64 << 20))
    assert "\n" not in str(refused.value)


def loaded_by_torch(folder: Path, utilization: float) -> tuple[TorchStep, Geometry]:
    """The same sizes with `--attention torch`."""
    config = {"vocab_size": 151936, "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8}
    more = {"num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], **config, **more}))
    settings = WorkerSettings(
        folder, model=str(folder), load_format="dummy", device="cuda", attention="torch", gpu_memory_utilization=utilization
    )
    step, description = TorchStep.load(settings, 1, lambda: None)
    return step, description.geometry


def test_the_torch_runner_does_likewise(tmp_path: Path) -> None:
    utilization = share(SPAN)
    step, geometry = loaded_by_torch(tmp_path, utilization)
    step.run(worst_step(geometry, long=True))
    limit = utilization * torch.cuda.mem_get_info()[1]
    assert limit - (1 << 30) < in_use() <= limit + (128 << 20)  # nothing is kept back for graphs, and the allocator may leave other gaps
    del step
    with pytest.raises(LoadError, match=r"not enough memory on the card: .* raise --gpu-memory-utilization"):
        loaded_by_torch(tmp_path, share(64 << 20))
