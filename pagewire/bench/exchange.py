"""One HTTP request on a raw socket, and when each piece of its answer came.

An ordinary client library costs more per chunk than the server it measures.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, cast


@dataclass
class Record:
    """What was seen of one request. Times are seconds on the monotonic clock, which all processes of a host share.

    A *chunk* is an event with choices. Of an answer that is not streamed, the first and last chunk are its end.
    """

    start: float
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between two chunks
    prompt_tokens: int = 0
    tokens: int = 0  # the server's own count; where it gives none, the chunks
    chunks: int = 0
    error: str = ""
    turn: int = 0  # of its conversation


class Exchange(asyncio.Protocol):
    """Sends one request on a connection of its own and reads its response. `done` is set at its end."""

    def __init__(self, head: bytes, body: bytes, record: Record, stream: bool, keep: bool) -> None:
        """stream: whether server-sent events are asked for. keep: whether the answer's text is wanted, in `answer`."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answer = ""
        self._request = head + body
        self._record = record
        self._stream = stream
        self._keep = keep
        self._status = 0
        self._over = False  # a stream has said [DONE]
        self._chunked = False
        self._left = -1  # bytes of an unchunked body still to come; negative: it goes on until the connection ends
        self._input = b""
        self._text = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            self._take(data, now)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            self._end(f"bad response: {error!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            if self._status and not self._chunked and self._left < 0:
                self._finish()
            else:
                self._end(f"connection lost: {exc}" if exc else "connection closed early")

    def _take(self, data: bytes, now: float) -> None:
        self._input += data
        if not self._status and not self._head():
            return
        if not self._chunked:
            payload, self._input = self._input, b""
            self._left -= len(payload)
            self._payload(payload, now)
            if self._left == 0:
                self._finish()
            return
        at, parts, over = 0, [], False
        while not over and (end := self._input.find(b"\r\n", at)) >= 0:
            size = int(self._input[at:end].split(b";")[0], 16)
            if len(self._input) < end + 4 + size:
                break
            parts.append(self._input[end + 2 : end + 2 + size])
            at, over = end + 4 + size, not size
        self._input = self._input[at:]
        self._payload(b"".join(parts), now)
        if over:
            self._finish()

    def _head(self) -> bool:
        head, found, rest = self._input.partition(b"\r\n\r\n")
        if not found:
            return False
        lines = head.lower().split(b"\r\n")
        self._status = int(lines[0].split()[1])
        headers = dict(line.split(b":", 1) for line in lines[1:])
        self._chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        self._left = int(headers.get(b"content-length", b"-1"))
        self._input = rest
        return True

    def _payload(self, data: bytes, now: float) -> None:
        self._text += data
        if not self._stream or self._status != 200:
            return
        self._text = self._text.replace(b"\r\n", b"\n")
        *events, self._text = self._text.split(b"\n\n")
        for event in events:
            at = event.find(b"data:")
            if at < 0:
                continue
            line = event[at + 5 :].strip()
            if line == b"[DONE]":
                self._over = True
            elif self._has_choices(line):
                self._chunk(now)

    def _has_choices(self, line: bytes) -> bool:
        """Whether an event has choices. Only the few that may hold something else are parsed, unless the text is wanted."""
        record = self._record
        if self._keep or b'"usage":{' in line or b'"usage": {' in line or b'"error"' in line or not record.chunks:
            self._look(json.loads(line))
            return not (record.error or b'"choices":[]' in line or b'"choices": []' in line)
        return True

    def _chunk(self, now: float) -> None:
        record = self._record
        if record.chunks:
            record.gaps.append(now - record.last)
        else:
            record.first = now
        record.last = now
        record.chunks += 1

    def _look(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise TypeError(f"{type(body).__name__} instead of an object")
        if error := body.get("error"):
            self._record.error = str(error.get("message", error) if isinstance(error, dict) else error)
        if usage := body.get("usage"):
            self._record.prompt_tokens = usage["prompt_tokens"]
            self._record.tokens = usage["completion_tokens"]
        if self._keep and body.get("choices"):
            choice = body["choices"][0]
            self.answer += choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""

    def _finish(self) -> None:
        if self._status != 200:
            self._end(f"status {self._status}: {self._text[:300].decode(errors='replace')}")
            return
        if not self._stream:
            self._look(json.loads(self._text))
            self._chunk(time.perf_counter())
        missing = "no chunk came" if not self._record.last else "the stream ended without [DONE]"
        self._end("" if self._record.last and (self._over or not self._stream) else missing)

    def _end(self, error: str) -> None:
        record = self._record
        record.error = record.error or error
        record.tokens = record.tokens or record.chunks
        self._transport.close()
        if not self.done.done():
            self.done.set_result(None)
