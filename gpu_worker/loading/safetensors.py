"""Safetensors files, one or several shards with an index, read piece by piece without loading a whole tensor twice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gpu_worker.errors import LoadError
from gpu_worker.loading.quantization import Quantization
from gpu_worker.loading.source import FP8_GROUP, FourBit, Fp8, Piece

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = "F8_E4M3"
INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """The tensors of a model folder (a TensorSource)."""

    def __init__(self, folder: Path, quantization: Quantization | None = None) -> None:
        """quantization: how fp8 tensors are scaled. Raises LoadError if the folder has no usable safetensors."""
        self.folder = folder
        self._quantization = quantization
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
        self._check_float(name)
        vector: torch.Tensor = self._find(name).get_tensor(name)
        return vector

    def number(self, name: str) -> float | None:
        return float(self._single(name)) if self.has(name) else None

    def _single(self, name: str) -> torch.Tensor:
        """A tensor of one element, float32 []."""
        values = self.vector(name)
        if values.numel() != 1:
            raise LoadError(f"{self.folder}: {name} has shape {list(values.shape)}; a tensor of one element is supported")
        return values.float().reshape(())

    def read(self, piece: Piece) -> torch.Tensor:
        part = self._stored(piece)
        if part.dtype != torch.float8_e4m3fn:
            return part
        at = piece.columns[0] % FP8_GROUP  # groups begin at multiples of 128
        whole = replace(piece, columns=(piece.columns[0] - at, piece.columns[1]))
        return self._scaled(whole).values()[:, at:]

    def fp8(self, piece: Piece) -> Fp8 | None:
        stored = self._find(piece.name).get_slice(piece.name).get_dtype()
        if stored != FP8 or (self._quantization and self._quantization.by_block and piece.columns[0] % FP8_GROUP):
            return None
        return self._scaled(piece)

    def _scaled(self, piece: Piece) -> Fp8:
        """An e4m3 piece with its scales."""
        if self._quantization is None:
            raise LoadError(f"{self.folder}: {piece.name} is fp8, and config.json has no quantization_config that says how it is scaled")
        name = piece.name.removesuffix("weight") + self._quantization.scales
        scales = self.vector(name).float()
        rows, columns = self._find(piece.name).get_slice(piece.name).get_shape()
        if self._quantization.by_block:
            fits = scales.shape == (-(-rows // FP8_GROUP), -(-columns // FP8_GROUP))
            first, last = piece.columns[0] // FP8_GROUP, -(-piece.columns[1] // FP8_GROUP)
        else:
            fits = scales.numel() in (1, rows)
            first, last = 0, 1
        if not fits:
            raise LoadError(f"{self.folder}: {name} has shape {list(scales.shape)}, which scales no matrix of {rows} × {columns}")
        if self._quantization.by_block:
            scales = scales.repeat_interleave(FP8_GROUP, 0)
        elif scales.numel() == 1:
            scales = scales.reshape(1, 1).expand(rows, 1)
        else:
            scales = scales.reshape(rows, 1)
        input_scale = self._single(piece.name.removesuffix("weight") + "input_scale") if self._quantization.static else None
        return Fp8(
            self._stored(piece),
            scales[slice(*piece.rows), first:last].contiguous(),
            input_scale,
        )

    def _stored(self, piece: Piece) -> torch.Tensor:
        view = self._find(piece.name).get_slice(piece.name)
        shape = view.get_shape()
        if len(shape) != 2 or not piece.fits(*shape):
            raise LoadError(f"{self.folder}: {piece.name} has shape {shape}, which is not what config.json's sizes say")
        if view.get_dtype() != FP8:
            self._check_float(piece.name)
        part: torch.Tensor = view[slice(*piece.rows), slice(*piece.columns)]
        return part

    def check_floats(self) -> None:
        """Raise LoadError if there are weights that do not stand for themselves, like integers and fp8, which have scales elsewhere.

        Masks and positions, which older tools stored too, have a first dimension of 1, or none.
        """
        for name, file in self._where.items():
            if file.get_slice(name).get_shape()[:1] > [1]:
                self._check_float(name)

    def _check_float(self, name: str) -> None:
        stored = self._find(name).get_slice(name).get_dtype()
        if stored not in FLOATS:
            raise LoadError(f"{self.folder}: {name} is stored as {stored}, which is not supported; {', '.join(FLOATS)} are")

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
