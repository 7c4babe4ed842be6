"""The flight recorder: the last message headers of a service, written down when something goes wrong."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

LENGTH = 1000  # messages remembered
KEPT = 16  # dumps kept per service name; the oldest are removed
HEADER_BYTES = 64  # of a frame that are kept; enough for a link header and a message's tag, not for a prompt


class FlightRecorder:
    """A ring of message headers, cheap enough to be always on (about 1 µs a message).

    It keeps the beginning of each frame and makes sense of it only when asked to write. Frames' contents beyond tag
    and link header are not written. May be used from several threads.
    """

    def __init__(self, folder: Path, name: str, length: int = LENGTH) -> None:
        self._folder = folder
        self._name = name
        self._ring: deque[tuple[float, str, str, list[tuple[int, bytes]]]] = deque(maxlen=length)
        self._numbers = itertools.count(1)

    def record(self, direction: str, peer: str, frames: Sequence[bytes]) -> None:
        """Remember a message. `direction` is `in` or `out`, `peer` says with whom (an endpoint, a session)."""
        self._ring.append((time.monotonic(), direction, peer, [(len(frame), bytes(frame[:HEADER_BYTES])) for frame in frames]))

    def dump(self, reason: str) -> Path:
        """Write the ring to a file of JSON lines, newest last, and return its path. The first line says why and when.

        Takes a few milliseconds: the caller may be a scheduler with streams to serve.
        """
        now = time.monotonic()
        path = self._folder / f"{self._name}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{next(self._numbers)}.jsonl"
        lines: list[object] = [{"reason": reason, "time": time.time(), "pid": os.getpid(), "service": self._name}]
        for at, direction, peer, frames in list(self._ring):
            size = sum(size for size, _ in frames)
            described = [_tag(head) if i else _header(head) for i, (_, head) in enumerate(frames)]
            lines.append({"age": round(now - at, 6), "direction": direction, "peer": peer, "bytes": size, "frames": described})
        path.write_bytes(msgspec.json.Encoder().encode_lines(lines))
        mine = sorted(self._folder.glob(f"{self._name}-2*.jsonl"), key=lambda p: p.stat().st_mtime_ns)
        for old in mine[:-KEPT]:
            old.unlink(missing_ok=True)
        return path


def _header(head: bytes) -> object:
    """The numbers of a link header; what is none, in hexadecimal."""
    try:
        return _numbers.decode(head)
    except msgspec.DecodeError:
        return head[:16].hex()


def _tag(head: bytes) -> str:
    """The short string that begins a MessagePack array: a message's tag. Nothing behind it is looked at."""
    start = 3 if head[:1] == b"\xdc" else 1
    if start == 3 or (head[:1] >= b"\x90" and head[:1] < b"\xa0"):
        length = head[start] - 0xA0 if len(head) > start else -1
        if 0 <= length < 32:
            return head[start + 1 : start + 1 + length].decode(errors="replace")
    return "?"


_numbers = msgspec.msgpack.Decoder(list[int])
