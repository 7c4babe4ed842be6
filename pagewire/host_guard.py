"""Which names a request to the admin port may call it by.

A page of another site can have its own name resolve to 127.0.0.1 and would then read this port as its own (DNS
rebinding). Its requests bear that name in `Host`, so only names that are this host's are answered.
"""

from __future__ import annotations

import ipaddress
import re

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.endpoints import is_loopback
from protocol.service import CannotRun

MISDIRECTED = 421  # RFC 9110 §15.5.20
_HOST = re.compile(r"(\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[\w-]+(\.[\w-]+)*)\.?)(:\d*)?", re.ASCII | re.IGNORECASE)  # RFC 9110 §7.2


def host_name(host: str) -> str:
    """The name or address in a `Host`, without port, brackets and last dot, in one spelling; empty if it has none."""
    found = _HOST.fullmatch(host)
    if found is None:
        return ""
    if not found["v6"]:
        return found["name"].lower()
    try:
        return str(ipaddress.IPv6Address(found["v6"]))
    except ValueError:
        return ""


def host_names(flag: str) -> frozenset[str]:
    """The names that --admin-hosts lists, with commas between. Raises CannotRun if one of them is none."""
    names = set()
    for given in filter(None, map(str.strip, flag.split(","))):
        name = host_name(given) or host_name(f"[{given}]")
        if not name:
            raise CannotRun(f"--admin-hosts {given}: no name or address that a Host header could have")
        names.add(name)
    return frozenset(names)


class HostGuard:
    """ASGI: lets a request through if its `Host` is a loopback name or address, or one of `names`, with any port.

    One without `Host` comes from no browser, and passes.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        """`names`: of `host_names`."""
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (host := Headers(scope=scope).get("host")) and not self._knows(host_name(host)):
            message = f"this admin server does not go by the name in Host, {host_name(host) or host!r}: name it with --admin-hosts"
            await JSONResponse({"error": {"message": message}}, MISDIRECTED)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, name: str) -> bool:
        return is_loopback(name) or name.endswith(".localhost") or name in self._names
