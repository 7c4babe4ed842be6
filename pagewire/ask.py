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

    The API is this host's own: with TLS, its certificate names another host and is not verified. An answer that breaks
    off ends early, which a reader sees by the missing `[DONE]`.
    """
    where = urlsplit(api)
    context = None
    if where.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {where.netloc}", "Connection: close", "Content-Type: application/json"]
    lines.append(f"Content-Length: {len(content)}")
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
        chunked = b"\r\ntransfer-encoding: chunked\r\n" in head.lower()
        try:
            # RFC 9112 §7.1: each chunk is its size in hexadecimal digits, a line end, the bytes and a line end
            while size := int((await reader.readline()).split(b";")[0], 16) if chunked else LONGEST:
                part = await reader.readexactly(size) if chunked else await reader.read(size)
                if not part:
                    break
                yield part
                if chunked:
                    await reader.readline()
        except (OSError, asyncio.IncompleteReadError, ValueError):
            return
        finally:
            writer.close()

    return status, parts()
