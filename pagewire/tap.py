"""`pagewire tap`: print a service's messages as they pass, decoded with the plain `msgpack` package."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

import msgpack
import zmq

SCALARS = (int, float, bool, type(None))
OPEN_TEXT = frozenset({"hello", "refused", "phase", "ready", "models", "failed"})  # messages whose text is no user's
ABOUT_A_REQUEST = frozenset({"submit", "abort", "done", "attach", "journal", "gone", "moved"})  # the id comes first


def messages(endpoint: str, context: zmq.Context[Any], stop: int = -1) -> Generator[tuple[str, float, list[bytes]], None, None]:
    """Subscribe, and yield (direction, Unix time, frames) until the file descriptor `stop`, if any, is readable."""
    with context.socket(zmq.SUB) as subscriber:
        subscriber.setsockopt(zmq.LINGER, 0)
        subscriber.subscribe(b"")
        subscriber.connect(endpoint)
        poller = zmq.Poller()
        poller.register(subscriber, zmq.POLLIN)
        if stop >= 0:
            poller.register(stop, zmq.POLLIN)
        while True:
            if stop in dict(poller.poll()):
                return
            direction, stamp, *frames = subscriber.recv_multipart()
            yield direction.decode(), int.from_bytes(stamp, "little") / 1e9, frames


def line(direction: str, at: float, frames: Sequence[bytes], content: bool) -> str:
    """One message as a line: time, direction, header, message."""
    clock = time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1e6):06d}"
    parts = [show(frame, content or number == 0) for number, frame in enumerate(frames)]
    return f"{clock} {'<-' if direction == 'in' else '->'} {' '.join(parts)}"


def show(frame: bytes, content: bool) -> str:
    """A frame as text. Without `content`, bytes and users' text (prompts, tokens, keys) are given by their size."""
    try:
        value = msgpack.unpackb(frame, raw=False, strict_map_key=False)
    except Exception as error:  # whatever a foreign frame makes of the decoder, it is shown rather than raised
        return f"<{len(frame)} bytes, not MessagePack: {type(error).__name__}>"
    if isinstance(value, list) and value and isinstance(value[0], str):
        tag, *fields = value
        open_text = content or tag in OPEN_TEXT
        if tag in ABOUT_A_REQUEST and fields and isinstance(fields[0], bytes):
            return " ".join([tag, fields[0].hex(), *(_text(field, open_text, content) for field in fields[1:])])
        return " ".join([tag, *(_text(field, open_text, content) for field in fields)])
    return _text(value, content, content)


def _text(value: object, text: bool, binary: bool) -> str:
    if isinstance(value, SCALARS):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_text(item, text, binary) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(k, text, binary)}: {_text(v, text, binary)}" for k, v in value.items()) + "}"
    if isinstance(value, bytes):
        return value.hex() if binary else f"<{len(value)}>"
    if isinstance(value, str):
        return repr(value) if text else f"<{len(value)}>"
    return repr(value) if binary else "<?>"
