"""A defect of ours behind a real server: the client is told, also that the connection ends with it."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import uvicorn

from frontend.http_protocol import HttpProtocol
from frontend.server import make_app
from tests.frontend.fakes import Engine, LocalClient, settings_for


def raise_defect() -> list[object]:
    raise RuntimeError("a defect")


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """Status line, headers and body of a GET over a connection that is kept."""
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
    headers = dict(line.lower().split(b": ", 1) for line in lines)
    return status, headers, await reader.readexactly(int(headers[b"content-length"]))


def test_the_connection_ends_with_the_answer_and_the_server_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        client = LocalClient(settings_for(tmp_path), Engine())
        await client.start()
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(make_app(client), http=HttpProtocol, ws="none", lifespan="off", log_config=None, access_log=False)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        entries, client.journal.entries = client.journal.entries, raise_defect  # type: ignore[method-assign, assignment]
        try:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            assert b"connection" not in (await ask(reader, writer, "/version"))[1]
            status, headers, body = await ask(reader, writer, "/load")
            assert status == b"HTTP/1.1 500 Internal Server Error"
            assert headers[b"connection"] == b"close"
            assert json.loads(body)["error"]["code"] == "internal_error"
            assert await asyncio.wait_for(reader.read(), 60) == b""
            client.journal.entries = entries  # type: ignore[method-assign]
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            assert (await ask(reader, writer, "/load"))[0] == b"HTTP/1.1 200 OK"
            writer.close()
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, 60)
            await client.stop()

    asyncio.run(asyncio.wait_for(main(), 120))
