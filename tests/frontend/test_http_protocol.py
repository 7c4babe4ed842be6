"""What a connection may send before a request is complete: bounded as it comes, in whatever place of HTTP it stands."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from frontend.access import MAX_HEADERS
from frontend.http_protocol import MAX_HEAD, HttpProtocol
from frontend.server import make_app
from tests.frontend.fakes import Engine, LocalClient, settings_for

PIECE = 16 << 10  # bytes that come at once
GET = b"GET /version HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def receive(tmp_path: Path, pieces: Iterable[bytes]) -> tuple[Transport, int, dict[tuple[str, ...], float]]:
    """Let a connection receive pieces until it is closed: its transport, how many bytes it took, and how requests were counted."""

    async def main() -> tuple[Transport, int, dict[tuple[str, ...], float]]:
        client = LocalClient(settings_for(tmp_path), Engine())
        await client.start()
        app = make_app(client)
        state = ServerState()
        protocol = HttpProtocol(uvicorn.Config(app, lifespan="off", log_config=None), state, {})
        transport, taken = Transport(), 0
        protocol.connection_made(transport)  # type: ignore[arg-type]
        for piece in pieces:
            protocol.data_received(piece)
            taken += len(piece)
            while state.tasks and not protocol.cycle.more_body:
                await asyncio.sleep(0)
            if transport.closed:
                break
        protocol.connection_lost(ConnectionResetError())
        await asyncio.gather(*state.tasks)
        await client.stop()
        ended = [series for series in app.state.accounts.series() if series.family == "pagewire_http_requests"]
        return transport, taken, {tuple(series.labels): series.value for series in ended}

    return asyncio.run(main())


ENDLESS = {
    "a header": (GET + b"x-a: ", b"a" * PIECE),
    "a header's name": (GET, b"a" * PIECE),
    "headers": (GET, b"".join(b"x-a: %04d\r\n" % i for i in range(PIECE // 11))),
    "a URL": (b"GET /", b"a" * PIECE),
    "empty lines": (b"", b"\r\n" * (PIECE // 2)),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"".join(b"x-a: %04d\r\n" % i for i in range(PIECE // 11))),
    "a trailer": (CHUNKED + b"2\r\n{}\r\n0\r\nx-a: ", b"a" * PIECE),
    "what a chunk says of itself": (CHUNKED + b"2;", b"a" * PIECE),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_never_ends_is_refused_as_it_comes(what: str, tmp_path: Path) -> None:
    begin, more = ENDLESS[what]
    transport, taken, ended = receive(tmp_path, itertools.chain([begin], itertools.repeat(more, 100)))
    assert transport.closed
    assert taken <= len(begin) + MAX_HEAD + PIECE
    assert transport.written.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert b'"code":"headers_too_large"' in transport.written
    assert ended["other", "431", "headers_too_large"] == 1


def test_headers_within_the_bound_may_come_in_pieces(tmp_path: Path) -> None:
    request = GET + b"x-a: " + b"a" * (MAX_HEADERS - 100) + b"\r\n\r\n"
    transport, taken, _ = receive(tmp_path, (request[i : i + 1000] for i in range(0, len(request), 1000)))
    assert taken == len(request)
    assert transport.written.startswith(b"HTTP/1.1 200 ")
    assert not transport.closed


@pytest.mark.parametrize(("length", "status"), [(MAX_HEADERS - 1100, b"200"), (MAX_HEADERS - 1000, b"431")])
def test_a_url_counts_with_the_headers(length: int, status: bytes, tmp_path: Path) -> None:
    transport, _, _ = receive(tmp_path, [b"GET /version?" + b"a" * length + b" HTTP/1.1\r\nx: " + b"a" * 1000 + b"\r\n\r\n"])
    assert transport.written.startswith(b"HTTP/1.1 %b " % status)


def test_requests_on_one_connection_and_their_bodies_do_not_add_up(tmp_path: Path) -> None:
    get = GET + b"x-a: " + b"a" * PIECE + b"\r\n\r\n"
    size = 4 * MAX_HEAD
    post = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size
    body = [b" " * PIECE] * (size // PIECE)
    transport, _, ended = receive(tmp_path, [*[get] * 20, post, *body, get])
    assert not transport.closed
    assert ended == {("/version", "200", "ok"): 21, ("/tokenize", "400", "invalid_json"): 1}


def test_a_chunked_body_in_tiny_chunks_is_taken(tmp_path: Path) -> None:
    pieces = [CHUNKED, *[b"1\r\n \r\n" * (PIECE // 6)] * 20, b"0\r\n\r\n"]
    transport, taken, ended = receive(tmp_path, pieces)
    assert taken == sum(map(len, pieces))
    assert not transport.closed
    assert ended == {("/tokenize", "400", "invalid_json"): 1}
