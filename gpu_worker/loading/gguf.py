"""GGUF files: metadata and tensors through the `gguf` package, under transformers' names."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from gpu_worker.errors import LoadError
from gpu_worker.loading.config import ModelConfig
from gpu_worker.loading.config import from_gguf as config_from_gguf
from gpu_worker.loading.source import FourBit, Fp8, Piece

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
_GROUP = 32
_READABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class _Reader(gguf.GGUFReader):
    """The package's reader, except that arrays are skipped: as numpy views, a vocabulary takes it 2.6 s."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        data: Any = self.data
        kind, count = struct.unpack_from("<IQ", data, orig_offs)
        size = 12
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(count):
                size += 8 + struct.unpack_from("<Q", data, orig_offs + size)[0]
        else:
            size += count * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(kind)]).itemsize
        return size, [self.data[orig_offs : orig_offs + size]], [0], [gguf.GGUFValueType.ARRAY]


class GgufFile:
    """One GGUF file: its metadata (arrays left out), configuration and tensors (a TensorSource)."""

    def __init__(self, path: Path) -> None:
        """Raises LoadError for a file that is damaged or holds no supported model."""
        try:
            reader = _Reader(path)
        except (ValueError, OSError, KeyError, IndexError, struct.error) as error:
            raise LoadError(f"{path} is not a readable GGUF file: {error}") from error
        self.path = path
        self.metadata: dict[str, Any] = {
            name: field.contents() for name, field in reader.fields.items() if gguf.GGUFValueType.ARRAY not in field.types
        }
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        for tensor in reader.tensors:
            if tensor.tensor_type.name not in _READABLE:
                raise LoadError(f"{path}: {tensor.tensor_type.name} tensors are not supported; supported are {', '.join(_READABLE)}")
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise LoadError(f"{path} lacks token_embd.weight: it holds no text model, or only a part of one")
        rope = self._tensors.get("rope_freqs.weight")
        self.config: ModelConfig = config_from_gguf(
            self.metadata,
            vocab_size=int(embedding.shape[1]),
            tied="output.weight" not in self._tensors,
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            factors=tuple(float(f) for f in rope.data) if rope is not None else (),
        )
        header = hashlib.blake2b(digest_size=16)
        header.update(reader.data[: reader.data_offset].tobytes())
        header.update(path.stat().st_size.to_bytes(8, "little"))
        self.header_hash = header.digest()

    @property
    def quantised(self) -> bool:
        """Whether most weights are stored in fewer than 16 bits."""
        small = sum(t.n_elements for t in self._tensors.values() if t.tensor_type.name.startswith("Q"))
        return 2 * small > sum(t.n_elements for t in self._tensors.values())

    def has(self, name: str) -> bool:
        return _gguf_name(name) in self._tensors

    def vector(self, name: str) -> torch.Tensor:
        tensor = self._find(name)
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(-1))
        return values[self._order(name, values.shape[0])]

    def read(self, piece: Piece) -> torch.Tensor:
        tensor = self._find(piece.name, piece)
        rows = self._row_ids(piece, int(tensor.shape[1]))
        values = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
        return torch.from_numpy(values[:, slice(*piece.columns)].astype(np.float32))

    def number(self, name: str) -> float | None:
        return None

    def fp8(self, piece: Piece) -> Fp8 | None:
        return None

    def four_bit(self, piece: Piece) -> FourBit | None:
        tensor = self._find(piece.name, piece)
        kind = tensor.tensor_type.name
        start, stop = piece.columns
        if kind not in ("Q4_0", "Q4_1") or start % _GROUP or stop % _GROUP:
            return None
        width = 18 if kind == "Q4_0" else 20  # bytes of a group: float16 d (and m), then 32 nibbles
        stored = tensor.data[self._row_ids(piece, int(tensor.shape[1]))]
        groups = stored.reshape(stored.shape[0], -1, width)[:, start // _GROUP : stop // _GROUP]
        halves = np.ascontiguousarray(groups[:, :, : width - 16]).view(np.float16).astype(np.float32)
        nibbles = groups[:, :, width - 16 :]
        # the low nibbles of a group are its first 16 weights, the high ones the others
        q = np.concatenate((nibbles & 15, nibbles >> 4), axis=2).reshape(stored.shape[0], stop - start)
        scale = halves[:, :, 0]
        zero = halves[:, :, 1] + 8 * scale if kind == "Q4_1" else np.zeros_like(scale)
        return FourBit(torch.from_numpy(q), torch.from_numpy(scale.copy()), torch.from_numpy(zero))

    def eight_bit(self, piece: Piece) -> bool:
        return bool(self._find(piece.name, piece).tensor_type.name == "Q8_0")

    def _find(self, name: str, piece: Piece | None = None) -> Any:
        tensor = self._tensors.get(_gguf_name(name))
        if tensor is None:
            raise LoadError(f"{self.path} lacks the tensor {_gguf_name(name)}")
        if piece is not None:
            columns, rows = (int(size) for size in tensor.shape)
            if not piece.fits(rows, columns):
                raise LoadError(f"{self.path}: {_gguf_name(name)} is {rows} × {columns}, which is not what the model's sizes say")
        return tensor

    def _row_ids(self, piece: Piece, rows: int) -> Any:
        order = self._order(piece.name, rows)
        return slice(*piece.rows) if isinstance(order, slice) else order[slice(*piece.rows)].numpy()

    def _order(self, name: str, rows: int) -> Any:
        """Which stored rows make up the rows that transformers has.

        For `llama` files the converter interleaves the two halves of each query and key head.
        """
        heads = {"q_proj": self.config.heads, "k_proj": self.config.kv_heads}.get(name.split(".")[-2])
        if heads is None or self.metadata["general.architecture"] != "llama":
            return slice(None)
        return torch.arange(rows).reshape(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_NAMES[part]}.{kind}"
