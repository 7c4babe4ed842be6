"""Messages on their way between the fakes and the engine: encoded, decoded and checked."""

from __future__ import annotations

from protocol.codec import decode, encode
from protocol.messages import Geometry, Message


def through(message: Message, geometry: Geometry | None = None) -> Message:
    message = decode(encode(message))
    message.check(geometry)
    return message
