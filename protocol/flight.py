"""The flight recorder: the last message headers of a service, written down when something goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgpack

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
        """Write the ring to a file of JSON lines, newest last, and return its path. The first line says why and when."""
        now = time.monotonic()
        path = self._folder / f"{self._name}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{next(self._numbers)}.jsonl"
        with path.open("w") as file:
            print(json.dumps({"reason": reason, "time": time.time(), "pid": os.getpid(), "service": self._name}), file=file)
            for at, direction, peer, frames in list(self._ring):
                entry = {
                    "age": round(now - at, 6),
                    "direction": direction,
                    "peer": peer,
                    "bytes": sum(size for size, _ in frames),
                    "frames": [_describe(head) for _, head in frames],
                }
                print(json.dumps(entry), file=file)
        mine = sorted(self._folder.glob(f"{self._name}-2*.jsonl"), key=lambda p: p.stat().st_mtime_ns)
        for old in mine[:-KEPT]:
            old.unlink(missing_ok=True)
        return path


def _describe(head: bytes) -> object:
    """The scalars that begin a MessagePack array, up to its first string (the tag) or the end of what was kept."""
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=False)
    unpacker.feed(head)
    fields: list[object] = []
    try:
        for _ in range(unpacker.read_array_header()):
            value = unpacker.unpack()
            if isinstance(value, str):
                fields.append(value[:40])
                break
            fields.append(value if isinstance(value, int | float | bool | None) else f"{len(value)} items")
    except (msgpack.UnpackException, ValueError, TypeError):
        pass
    return fields or head[:16].hex()
