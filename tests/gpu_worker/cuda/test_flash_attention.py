"""The flash_attn backend on a card: teacher-forced logits in bf16, beside those of the torch backend, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.attention.backends import make_backend
from gpu_worker.attention.interface import CacheShape, Rows, new_cache
from gpu_worker.loading.dummy import DummyTensors
from gpu_worker.models.llama import Llama
from gpu_worker.models.weights import DenseMaker, load_weights
from tests.gpu_worker.cuda.reference import Reference, error
from tests.gpu_worker.cuda.test_engine import CONFIGS, prompts

PAGE, LENGTH = 256, 1100
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def teacher_forced(name: str, backend: str, dtype: torch.dtype, texts: list[np.ndarray], source: DummyTensors) -> torch.Tensor:
    """The logits behind every token, [tokens, vocab]: prefilled in two chunks, then a token at a time, in one batch."""
    config = CONFIGS[name]
    width = -(-LENGTH // PAGE)
    shape = CacheShape(config.layers, len(texts) * width, config.kv_heads, PAGE, config.head_dim)
    attention = make_backend(backend, new_cache(shape, DEVICE, dtype), shape, config.heads)
    model = Llama(config, load_weights(config, source, DenseMaker(DEVICE, dtype)), LENGTH, DEVICE)
    tables = np.arange(shape.blocks, dtype=np.int32).reshape(len(texts), width)
    logits: list[list[torch.Tensor]] = [[] for _ in texts]
    done = [0] * len(texts)
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        rows = [i for i, text in enumerate(texts) if done[i] < len(text)]
        counts = [1 if done[i] >= len(texts[i]) - 3 else max(1, min(-(-len(texts[i]) // 2), len(texts[i]) - 3 - done[i])) for i in rows]
        starts = np.array([done[i] for i in rows], np.int32)
        ids = np.concatenate([texts[i][done[i] : done[i] + n] for i, n in zip(rows, counts, strict=True)])
        positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        attention.begin(Rows(starts, np.array(counts, np.int32), tables[rows], np.zeros(len(rows), bool)))
        on_card = (torch.from_numpy(x.astype(np.int64)).to(DEVICE) for x in (ids, positions, np.arange(len(ids))))
        out = model.logits(model.forward(*on_card, attention, lambda: None))
        for i, part in zip(rows, out.split(counts), strict=True):
            logits[i].append(part)
            done[i] += len(part)
    return torch.cat([torch.cat(parts) for parts in logits])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2", "smollm2"])
def test_bf16_logits_stay_within_twice_the_error_of_the_torch_backend(name: str) -> None:
    pytest.importorskip("flash_attn")
    config = CONFIGS[name]
    source = DummyTensors(config, 1, DEVICE, torch.float32)
    texts = prompts([1, 5, 255, 256, 257, 700], config.vocab_size)
    reference = Reference(config, source, torch.bfloat16, torch.float64, str(DEVICE))
    want = torch.cat([reference.logits(torch.tensor(text, device=DEVICE)) for text in texts])
    bound = error(teacher_forced(name, "torch", torch.bfloat16, texts, source), want)
    assert error(teacher_forced(name, "flash_attn", torch.bfloat16, texts, source), want) < 2 * bound
