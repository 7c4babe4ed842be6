"""Endpoints as users name them, and where a link may run: `ipc://` at will, `tcp://` off this host only with keys."""

from __future__ import annotations

import ipaddress
import socket

from protocol.service import CannotRun

HELP = "ipc://PATH or tcp://ADDRESS:PORT"


def check_endpoint(endpoint: str, flag: str, secured: bool, binds: bool = False) -> None:
    """Raise CannotRun, one line, if an endpoint is none, or if it leaves this host without keys. `flag` named it."""
    if endpoint.startswith("ipc://") and len(endpoint) > len("ipc://"):
        return
    host = _host(endpoint, flag)
    if binds and _is_any(host):
        raise CannotRun(f"{flag} {endpoint}: name the one address that peers use; all of them at once is never what is meant")
    if not secured and not is_loopback(host):
        raise CannotRun(
            f"{flag} {endpoint}: a link that leaves this host must be encrypted: make keys with `pagewire keys`, name them with --key-file"
        )


def check_local(endpoint: str, flag: str) -> None:
    """Raise CannotRun if an endpoint leaves this host."""
    if not endpoint.startswith("ipc://") and not is_loopback(_host(endpoint, flag)):
        raise CannotRun(f"{flag} {endpoint}: figures do not leave their host; run a `pagewire admin` there")


def is_loopback(host: str) -> bool:
    """Whether an address, or the name `localhost`, is this host's own. Other names are not resolved: they may change."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def http_url(listening: socket.socket, scheme: str = "http") -> str:
    """The URL of a listening socket, as a client on this host would name it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _host(endpoint: str, flag: str) -> str:
    host, colon, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not colon or not host or not (port.isdigit() and 0 < int(port) < 65536):
        raise CannotRun(f"{flag} {endpoint}: an endpoint is {HELP}")
    return host.removeprefix("[").removesuffix("]")


def _is_any(host: str) -> bool:
    try:
        return host == "*" or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
