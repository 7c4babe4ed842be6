"""An OpenAI-compatible server, in a thread, whose every chunk comes at a known time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.pagewire.processes import PATIENCE


@dataclass
class Script:
    """How each request is answered: seconds before the first chunk and between chunks; tokens of a chunk."""

    wait: float = 0.03
    gap: float = 0.01
    tokens_each: int = 1
    usage: bool = True
    status: int = 200
    break_off: bool = False  # close the connection in the middle
    together: int = 0  # requests that must have been under way at once before any is answered
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[bytes] = field(default_factory=list)
    most: int = 0  # requests under way at once
    running: int = 0


@contextlib.contextmanager
def scripted_server(script: Script) -> Iterator[str]:
    """The URL of a running server."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(lambda r, w: _serve(script, r, w), "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


async def _serve(script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /v1/models"):
            _whole(writer, 200, {"data": [{"id": "scripted"}]})
        else:
            script.headers.append(head)
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            script.asked.append(body)
            script.running += 1
            script.most = max(script.most, script.running)
            try:
                await _answer(script, body, writer)
            finally:
                script.running -= 1
        await writer.drain()
        writer.close()


async def _answer(script: Script, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    count = -(-body["max_tokens"] // script.tokens_each)
    words = [f"w{i} " for i in range(count)]
    prompt = body.get("prompt") or body["messages"][-1]["content"]
    usage = {"prompt_tokens": len(prompt), "completion_tokens": body["max_tokens"]} if script.usage else None
    late = time.monotonic() + PATIENCE
    while script.most < script.together and time.monotonic() < late:
        await asyncio.sleep(0.001)
    await asyncio.sleep(script.wait)
    if script.status != 200:
        _whole(writer, script.status, {"error": {"message": "scripted"}})
        return
    chat = "messages" in body
    if not body.get("stream"):
        text = "".join(words)
        _whole(
            writer, 200, {"choices": [{"message": {"content": text}} if chat else {"text": text}], **({"usage": usage} if usage else {})}
        )
        return
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    for i, word in enumerate(words):
        if i:
            await asyncio.sleep(script.gap)
        if script.break_off and i == 2:
            return
        _event(writer, {"choices": [{"delta": {"content": word}} if chat else {"text": word}], "usage": None})
        await writer.drain()
    if usage:
        _event(writer, {"choices": [], "usage": usage})
    data = b"data: [DONE]\n\n"
    writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))


def _event(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    data = b"data: %b\n\n" % json.dumps(body, separators=(",", ":")).encode()
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def _whole(writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(data), data))
