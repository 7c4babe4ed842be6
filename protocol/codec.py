"""Frames. On the wire a message is [header] or [header, body]: both MessagePack, the body a tagged array.

The header orders and acknowledges (`links.py`); an unsequenced message has sequence 0. Nothing is decoded before its
size and frame count have been checked.
"""

from __future__ import annotations

from typing import cast

import msgspec

from protocol.columns import BadMessage
from protocol.messages import Any, Message, Part

MAX_FRAME = 64 << 20  # bytes; sockets set it as ZMQ_MAXMSGSIZE
MAX_SUBMIT = MAX_FRAME // 2  # bytes of a SUBMIT: a plan that admits the request must have room for more
MAX_HEADER = 64
HIGH_WATER = 10_000  # messages; only the seat belt, links keep far below


class Header(Part, frozen=True):
    """What orders a frame: session 0 means none is open, sequence 0 that the frame is not ordered."""

    session: int = 0
    sequence: int = 0
    acknowledged: int = 0  # every sequence up to this one has arrived


_encoder = msgspec.msgpack.Encoder()
_header = msgspec.msgpack.Decoder(Header)
_message = msgspec.msgpack.Decoder(Any)


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message or a header."""
    return _encoder.encode(message)


def decode_header(frames: list[bytes]) -> Header:
    """Decode the first frame. Raises BadMessage for a wrong number of frames, a size or a shape."""
    if not 1 <= len(frames) <= 2:
        raise BadMessage("frames", f"{len(frames)} where 1 or 2 belong")
    if len(frames[0]) > MAX_HEADER:
        raise BadMessage("header", f"{len(frames[0])} bytes")
    if len(frames) == 2 and len(frames[1]) > MAX_FRAME:
        raise BadMessage("body", f"{len(frames[1])} bytes")
    try:
        header = _header.decode(frames[0])
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise BadMessage("header", str(error)) from None
    if header.session < 0 or header.sequence < 0 or header.acknowledged < 0:
        raise BadMessage("header", "a negative number")
    return header


def decode(body: bytes) -> Message:
    """Decode a body. Raises BadMessage for an unknown tag, a wrong type, garbage, or nesting without end."""
    try:
        return cast(Message, _message.decode(body))
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise BadMessage("body", str(error)) from None
