"""Safetensors files, one or several shards with an index, read piece by piece without loading a whole tensor twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gpu_worker.errors import LoadError
from gpu_worker.loading.source import FourBit, Piece

INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """The tensors of a model folder (a TensorSource)."""

    def __init__(self, folder: Path) -> None:
        """Raises LoadError if the folder has no usable safetensors."""
        self.folder = folder
        try:
            files = _files(folder)
            self._open: list[Any] = [safe_open(file, framework="pt") for file in files]
            self._where: dict[str, Any] = {name: file for file in self._open for name in file.keys()}  # noqa: SIM118
            self.header_hash = _header_hash(files)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise LoadError(f"cannot read the weights in {folder}: {error}") from error

    def has(self, name: str) -> bool:
        return name in self._where

    def vector(self, name: str) -> torch.Tensor:
        vector: torch.Tensor = self._find(name).get_tensor(name)
        return vector

    def read(self, piece: Piece) -> torch.Tensor:
        view = self._find(piece.name).get_slice(piece.name)
        shape = view.get_shape()
        if len(shape) != 2 or piece.rows[1] > shape[0] or piece.columns[1] > shape[1]:
            raise LoadError(f"{self.folder}: {piece.name} has shape {shape}, too small for the model's sizes")
        part: torch.Tensor = view[slice(*piece.rows), slice(*piece.columns)]
        return part

    def four_bit(self, piece: Piece) -> FourBit | None:
        return None

    def eight_bit(self, piece: Piece) -> bool:
        return False

    def _find(self, name: str) -> Any:
        if name not in self._where:
            raise LoadError(f"{self.folder} lacks the tensor {name}")
        return self._where[name]


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise LoadError(f"{folder} has no *.safetensors; supported weights are safetensors and GGUF")
    return files


def _header_hash(files: list[Path]) -> bytes:
    """16 bytes over the headers and sizes of the files: what distinguishes weights without reading them."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            length = file.read(8)
            digest.update(length + file.read(min(int.from_bytes(length, "little"), 100 << 20)))
        digest.update(path.stat().st_size.to_bytes(8, "little"))
    return digest.digest()
