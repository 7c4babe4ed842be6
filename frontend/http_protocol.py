"""uvicorn's HTTP, with a bound for what comes before a request, and refusals in JSON like every other error."""

from __future__ import annotations

import http
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from frontend.access import MAX_HEADERS
from frontend.accounts import NO_HTTP
from frontend.errors import ApiError

MAX_HEAD = 2 * MAX_HEADERS  # bytes of a request before its body: names and values, and what stands between them


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    The parser keeps a URL, headers and trailers until they are complete, and nobody has been asked for a key by then. So
    bytes are counted as they come: those since the last that completed a head or brought a piece of a body.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._pending = 0

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        super().data_received(data)
        if self._pending > MAX_HEAD and not self.transport.is_closing():
            self._refuse(ApiError(431, f"a request has more than {MAX_HEAD} bytes before its body", code="headers_too_large"))

    def on_headers_complete(self) -> None:
        self._pending = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._pending = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code=NO_HTTP))

    def _refuse(self, error: ApiError) -> None:
        """Answer what does not get as far as the application, and close the connection."""
        self.config.app.state.accounts.refused(error)  # type: ignore[union-attr]  # it is what `make_app` made
        body = msgspec.json.encode(error.body())
        status = f"{error.status} {http.HTTPStatus(error.status).phrase}"
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
