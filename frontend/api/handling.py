"""What the endpoints share: reading a body, waiting for a stream, and every error in one shape."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from frontend.access import ENDING, KEY_NAME
from frontend.accounts import BEGUN, CLIENT_GONE
from frontend.api.answers import Answer
from frontend.client import Client
from frontend.entries import NewRequest
from frontend.errors import ApiError, from_failed
from frontend.sse import EventStream, Watch
from frontend.streams import Stream

log = logging.getLogger("frontend")

MAX_TENANT = 200  # characters
MAX_AT_ONCE = 1024  # log probabilities of an answer in one piece; each takes 3 µs to write


def client_of(request: Request) -> Client:
    """The client that the application was made with."""
    client: Client = request.app.state.client
    return client


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(body), status, headers, "application/json")


async def read_body(request: Request) -> bytes:
    """The body, bounded. Raises ApiError: 413, and 415 for one that is compressed."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise ApiError(415, f"Content-Encoding {encoding[:40]!r} is not supported: send the body as it is", code="unsupported_encoding")
    limit = client_of(request).settings.max_body
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def tenant_of(request: Request) -> str:
    """Whose request this is, for the scheduler's fairness: the name of its API key, else what it says of itself."""
    name: str = request.scope.get(KEY_NAME, "")
    return name or request.headers.get("x-tenant", "")[:MAX_TENANT]


def submit(request: Request, new: Sequence[NewRequest]) -> Stream:
    """Submit what an HTTP request asks for: it began when that came, and is traced as that says."""
    return client_of(request).submit(new, request.scope[BEGUN], request.headers.get("traceparent", ""))


async def wait_whole(request: Request, stream: Stream) -> None:
    """Wait until a stream has ended; leave it open. Raises ApiError if the server gives up, ClientDisconnect."""
    watch = Watch(request.receive, stream)
    try:
        await stream.end()
    finally:
        watch.close()
    if stream.gone:
        raise ClientDisconnect
    if stream.error is not None:
        raise stream.error


async def whole(request: Request, answer: Answer) -> Response:
    """The answer of an ended stream, in one piece; a long one is written in a thread, where Python gives other streams their turns."""
    if answer.log_probabilities <= MAX_AT_ONCE:
        return json_response(answer.whole())
    return await client_of(request).offload_aside(lambda: json_response(answer.whole()))


async def respond(request: Request, stream: Stream, answer: Answer, streaming: bool) -> ASGIApp:
    """The response to a submitted request. Owns the stream from here on."""
    if not streaming:
        try:
            await wait_whole(request, stream)
            return await whole(request, answer)
        finally:
            stream.close()
    watch = Watch(request.receive, stream)
    try:
        # The status is not sent before something is known: a refusal should be a 4xx, not an event.
        await stream.news()
        if stream.gone:
            raise ClientDisconnect
        error = stream.error or next((from_failed(entry.error) for entry in stream.entries if entry.error is not None), None)
        if error is not None:
            raise error
    except BaseException:
        watch.close()
        stream.close()
        raise
    return EventStream(stream, watch, answer.events())


# Exception handlers are coroutines: Starlette would run functions in a thread, which a refusal has no time for.


async def api_error(request: Request, error: Exception) -> Response:
    """Exception handler: ApiError."""
    assert isinstance(error, ApiError)
    request.scope[ENDING] = error.code or error.type
    headers = {"retry-after": str(max(1, round(error.retry_after)))} if error.retry_after else None
    return json_response(error.body(), error.status, headers)


async def http_error(request: Request, error: Exception) -> Response:
    """Exception handler: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    request.scope[ENDING] = _CODES.get(error.status_code, str(error.status_code))
    where = f"{request.method} {request.url.path}"
    messages = {404: f"there is no {request.url.path}", 405: f"{where}: this method is not allowed here"}
    body = ApiError(error.status_code, messages.get(error.status_code, error.detail), code=_CODES.get(error.status_code, "")).body()
    return json_response(body, error.status_code, dict(error.headers or {}))


async def disconnected(request: Request, error: Exception) -> Response:
    """Exception handler: nobody is there to read the answer."""
    request.scope[ENDING] = CLIENT_GONE
    return Response(status_code=499)


async def internal_error(request: Request, error: Exception) -> Response:
    """Exception handler: a defect of ours. The stack goes to the log, not to the client.

    Starlette raises the exception again behind this answer, and uvicorn closes the connection, which the client is told.
    """
    return json_response(ApiError(500, "internal error", code="internal_error").body(), 500, {"connection": "close"})


_CODES = {404: "not_found", 405: "method_not_allowed"}

HANDLERS: Any = {ApiError: api_error, HTTPException: http_error, ClientDisconnect: disconnected, Exception: internal_error}
