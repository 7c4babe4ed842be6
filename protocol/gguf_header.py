"""The header of a GGUF file: its key/value pairs, and what its tensors are called and stored as, without their data.

Vocabularies are arrays of 50,000 strings and more; the `gguf` package turns each into several numpy views (3.4 s for
SmolLM2, where this takes 0.1 s), so the tokenizer tables are read here. Layout: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

Value = bool | int | float | str | list["Value"]

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_KEYS = 1 << 16
_MAX_DEPTH = 4
_MAX_TENSORS = 1 << 20
_MAX_DIMENSIONS = 8

_Read = TypeVar("_Read")


class GgufError(ValueError):
    """A file that is no GGUF, or a damaged one."""


class TensorInfo(NamedTuple):
    """How a tensor is stored. `shape` is in elements, the fastest dimension first; `kind` is GGML's number of the format."""

    shape: tuple[int, ...]
    kind: int


def read_header(path: Path, wanted: Callable[[str], bool]) -> dict[str, Value]:
    """The header's values whose keys are `wanted`. Raises GgufError, or OSError if the file cannot be read."""
    return _read(path, lambda header: header.read(wanted))


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    """The file's tensors by name. Raises GgufError, or OSError if the file cannot be read."""
    return _read(path, lambda header: header.tensors())


def _read(path: Path, part: Callable[[_Header], _Read]) -> _Read:
    with path.open("rb") as file:
        if file.seek(0, 2) < 24:
            raise GgufError(f"{path} is too short for a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return part(_Header(data))
            except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
                raise GgufError(f"{path} has a damaged GGUF header: {error}") from error
            except GgufError as error:
                raise GgufError(f"{path}: {error}") from None


class _Header:
    """A cursor over the header's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._tensors = 0

    def read(self, wanted: Callable[[str], bool]) -> dict[str, Value]:
        if self._data[:4] != _MAGIC:
            raise GgufError("not a GGUF file")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise GgufError(f"GGUF version {version} is not supported; versions 2 and 3 are (little-endian)")
        self._tensors = int(self._number("Q"))
        keys = int(self._number("Q"))
        if keys > _MAX_KEYS:
            raise GgufError(f"{keys} keys are more than any model has")
        values: dict[str, Value] = {}
        for _ in range(keys):
            key = self._string()
            value = self._value(int(self._number("I")), 0)
            if wanted(key):
                values[key] = value
        return values

    def tensors(self) -> dict[str, TensorInfo]:
        self.read(lambda key: False)
        if self._tensors > _MAX_TENSORS:
            raise GgufError(f"{self._tensors} tensors are more than any model has")
        found = {}
        for _ in range(self._tensors):
            name, dimensions = self._string(), int(self._number("I"))
            if dimensions > _MAX_DIMENSIONS:
                raise GgufError(f"the tensor {name} has {dimensions} dimensions")
            shape = tuple(int(self._number("Q")) for _ in range(dimensions))
            found[name] = TensorInfo(shape, int(self._number("I")))
            self._number("Q")  # where its data lie
        return found

    def _number(self, code: str) -> int | float | bool:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        assert isinstance(value, int | float)
        return value

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._data, self._at)
        start = self._at + 8
        self._at = start + length
        if self._at > len(self._data):
            raise IndexError("a string reaches beyond the file")
        return self._data[start : self._at].decode()

    def _value(self, kind: int, depth: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(depth + 1)
        if kind not in _FORMATS:
            raise GgufError(f"value type {kind} is unknown")
        return self._number(_FORMATS[kind])

    def _array(self, depth: int) -> Value:
        kind, length = int(self._number("I")), int(self._number("Q"))
        if length > len(self._data) or depth > _MAX_DEPTH:
            raise GgufError("an array reaches beyond the file")
        if kind in _FORMATS:
            layout = struct.Struct(f"<{length}{_FORMATS[kind]}")
            values = layout.unpack_from(self._data, self._at)
            self._at += layout.size
            return list(values)
        return [self._value(kind, depth) for _ in range(length)]
