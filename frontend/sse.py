"""Server-sent events: what stands on the line between a server and a streaming client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from frontend.access import ENDING
from frontend.accounts import CLIENT_GONE, MOVED
from frontend.streams import Stream

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"  # a comment: keeps proxies and clients from giving up

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would hold the events back
    ],
}


class Watch:
    """Notices that the client has gone, for as long as its request is worked on, and tells the stream."""

    def __init__(self, receive: Receive, stream: Stream) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(receive, stream))

    async def _run(self, receive: Receive, stream: Stream) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.leave()

    def close(self) -> None:
        """Stop watching."""
        self._task.cancel()


class EventStream:
    """A streamed response (an ASGI callable). `parts` yields events, several in one part if they came together.

    It owns the stream and its watch, and closes both. A stream that has moved to another frontend is cut off rather
    than ended, so that its client asks again.
    """

    def __init__(self, stream: Stream, watch: Watch, parts: AsyncIterator[bytes]) -> None:
        self._stream = stream
        self._watch = watch
        self._parts = parts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        try:
            await send(dict(_START))
            async for part in self._parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            if any(entry.moved for entry in self._stream.entries):
                scope[ENDING] = MOVED
                return
            if self._stream.gone:
                scope[ENDING] = CLIENT_GONE
            elif self._stream.error is not None:
                scope[ENDING] = self._stream.error.code or self._stream.error.type
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._watch.close()
            self._stream.close()
