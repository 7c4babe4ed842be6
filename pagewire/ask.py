"""The live page's prompt box: passes a completion on to the API and its events back, as they come."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 5.0  # seconds to connect
LONGEST = 1 << 16  # bytes of one read


class AskError(Exception):
    """The API could not be asked; the message is one line for the user."""


async def ask(api: str, body: dict[str, Any], key: str) -> tuple[int, AsyncIterator[bytes]]:
    """POST a completion to the API at the URL `api`. Returns the status and the body's parts. Raises AskError.

    HTTP/1.0, so that the answer ends with its connection and needs no unpacking. The API is this host's own: with
    TLS, its certificate names another host and is not verified.
    """
    where = urlsplit(api)
    context = None
    if where.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.0", f"Host: {where.netloc}", "Content-Type: application/json", f"Content-Length: {len(content)}"]
    if key:
        if not key.isascii() or not key.isprintable():
            raise AskError("the key holds characters that no key has")
        lines.append(f"Authorization: Bearer {key}")
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(where.hostname, where.port, ssl=context)
    except (OSError, TimeoutError) as error:
        raise AskError(f"the API at {api} does not answer: {error}") from None
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, IndexError) as error:
        writer.close()
        raise AskError(f"the API at {api} broke off: {error}") from None
    except BaseException:
        writer.close()
        raise

    async def parts() -> AsyncIterator[bytes]:
        try:
            while part := await reader.read(LONGEST):
                yield part
        finally:
            writer.close()

    return status, parts()
