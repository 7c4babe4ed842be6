"""Which names a request to the admin port may call it by.

A page of another site can have its own name resolve to 127.0.0.1 and would then read this port as its own (DNS
rebinding). Its requests bear that name in `Host`, so only names that are this host's are answered.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.endpoints import is_loopback

MISDIRECTED = 421  # RFC 9110 §15.5.20


class HostGuard:
    """ASGI: lets a request through if its `Host` is a loopback name or address, or one of `names`, with any port.

    One without `Host` comes from no browser, and passes.
    """

    def __init__(self, app: ASGIApp, names: str) -> None:
        """`names`: with commas between."""
        self._app = app
        self._names = {name.strip().lower() for name in names.split(",")} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (host := Headers(scope=scope).get("host")) and not self._knows(host):
            message = f"this admin server does not go by the name in Host, {host!r}: name it with --admin-hosts"
            await JSONResponse({"error": {"message": message}}, MISDIRECTED)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
        except ValueError:
            return False
        return is_loopback(name) or name.endswith(".localhost") or name in self._names
