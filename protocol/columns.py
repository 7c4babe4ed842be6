"""Columns: packed little-endian arrays inside messages.

A step message carries a few of these instead of one record per sequence; encoding is one copy, decoding none.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

EMPTY: Int32 = np.zeros(0, dtype=np.int32)

# Made once: numpy takes 0.3 µs to read "<i4", and a plan has 25 columns.
_I4 = np.dtype("<i4")
_U4 = np.dtype("<u4")


class BadMessage(ValueError):
    """A frame or a field that must not be used; `field` names it."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field


def pack(values: Int32 | Iterable[int]) -> bytes:
    """Pack integers (shape [n]) as little-endian int32. Raises OverflowError for a value outside int32."""
    return np.ascontiguousarray(values if isinstance(values, np.ndarray) else list(values), dtype=_I4).tobytes()


def unpack(column: bytes) -> Int32:
    """View a packed column as a read-only int32 array, shape [len / 4]. The length must have been checked."""
    return np.frombuffer(column, _I4)


def pack_floats(values: Float32 | Iterable[float]) -> bytes:
    """Pack numbers (shape [n]) as little-endian float32."""
    return np.ascontiguousarray(values if isinstance(values, np.ndarray) else list(values), dtype="<f4").tobytes()


def unpack_floats(column: bytes) -> Float32:
    """View a packed column as a read-only float32 array, shape [len / 4]."""
    return np.frombuffer(column, dtype="<f4")


def rows(column: bytes, field: str, width: int = 4) -> int:
    """Number of rows in a column of `width` bytes a row. Raises BadMessage if the length is no multiple of it."""
    n, rest = divmod(len(column), width)
    if rest:
        raise BadMessage(field, f"{len(column)} bytes is no multiple of {width}")
    return n


def equal_rows(first: tuple[str, bytes], *others: tuple[str, bytes]) -> int:
    """Check that int32 columns have the same number of rows, and return it."""
    n = rows(first[1], first[0])
    for field, column in others:
        if len(column) != len(first[1]):
            raise BadMessage(field, f"{rows(column, field)} rows beside {n} of {first[0]}")
    return n


def within(column: bytes, field: str, low: int, high: int) -> Int32:
    """Check that a column is one of int32 with every value in [low, high), and return the array."""
    if not column:
        return EMPTY
    rows(column, field)
    # Seen as unsigned and from `low` on, a value below it is too high as well: one pass instead of two.
    above = np.frombuffer(column, _U4)
    if low:
        above = above - np.uint32(low & 0xFFFFFFFF)
    if int(np.maximum.reduce(above)) >= high - low:
        raise BadMessage(field, f"a value outside [{low}, {high})")
    return unpack(column)


def finite(value: float, field: str, low: float = -inf) -> None:
    """Check that a number is finite and at least `low`."""
    if not low <= value < inf or value == -inf:
        raise BadMessage(field, f"{value} is out of range")
