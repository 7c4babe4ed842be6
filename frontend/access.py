"""Who may use the API: keys from a file, everything closed but the paths that only say whether the service lives."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import msgspec

from frontend.errors import ApiError
from protocol.endpoints import is_loopback
from protocol.service import CannotRun

OPEN_PATHS = frozenset(("/health", "/ping", "/ready"))  # answered without a key
KEY_NAME = "pagewire.key"  # where the scope says whose key it was
ENDING = "pagewire.ending"  # where it says how the request ended, if otherwise than with the answer (`accounts.py`)
MAX_HEADERS = 64 << 10  # bytes of all names and values, and of the URL; `http_protocol.py` bounds what is not yet complete
LEAST_KEY = 16  # characters

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class ApiKeys:
    """The keys that are accepted, each with the name of whoever holds it. Kept as hashes only."""

    def __init__(self, keys: dict[str, str]) -> None:
        """`keys`: name → key."""
        self._digests = [(name, hashlib.sha256(key.encode()).digest()) for name, key in keys.items()]

    @staticmethod
    def read(path: str) -> ApiKeys:
        """Read lines `NAME KEY`; empty ones and those that begin with # do not count. Raises CannotRun, one line."""
        keys: dict[str, str] = {}
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CannotRun(f"--api-key-file {path}: {error}") from None
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2:
                raise CannotRun(f"--api-key-file {path}, line {number}: not of the form NAME KEY")
            name, key = words
            if name in keys:
                raise CannotRun(f"--api-key-file {path}, line {number}: the name {name} occurs twice")
            if len(key) < LEAST_KEY:
                raise CannotRun(f"--api-key-file {path}, line {number}: a key has at least {LEAST_KEY} characters")
            if holder := next((other for other, known in keys.items() if known == key), ""):
                raise CannotRun(f"--api-key-file {path}, line {number}: the key of {name} is that of {holder}")
            keys[name] = key
        if not keys:
            raise CannotRun(f"--api-key-file {path}: holds no key")
        return ApiKeys(keys)

    def name_of(self, key: bytes) -> str:
        """Whose key this is; empty if nobody's. Takes the same time whichever it is."""
        given = hashlib.sha256(key).digest()
        found = ""
        for name, digest in self._digests:
            if hmac.compare_digest(given, digest):
                found = name
        return found


def check_exposure(host: str, api_key_file: str, auth: bool) -> None:
    """Raise CannotRun if the API would be open to other hosts by oversight."""
    if not api_key_file and auth and not is_loopback(host):
        raise CannotRun(f"host {host} lets other hosts in: name the keys they must have (--api-key-file), or say --no-auth")


def check_tls(certfile: str, keyfile: str) -> None:
    """Raise CannotRun if certificate and key are no pair that can be used."""
    if keyfile and not certfile:
        raise CannotRun("--ssl-keyfile needs --ssl-certfile")
    if certfile:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile or None, _no_passphrase)
        except (OSError, ssl.SSLError) as error:
            raise CannotRun(f"--ssl-certfile {certfile}: {error}") from None


def _no_passphrase() -> str:
    raise OSError("its key is encrypted, and nobody can be asked for the passphrase")  # OpenSSL would ask at the terminal


class Guard:
    """ASGI: lets a request through if its headers are of bearable size and, where there are keys, it has one."""

    def __init__(self, app: App, keys: ApiKeys | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = self._refusal(scope)
            if error is not None:
                scope[ENDING] = error.code
                await answer(error, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        url = len(scope["path"]) + len(scope["query_string"])
        if url + sum(len(name) + len(value) for name, value in headers) > MAX_HEADERS:
            return ApiError(431, f"URL and headers have more than {MAX_HEADERS} bytes together", code="headers_too_large")
        if self._keys is None or scope["path"] in OPEN_PATHS:
            return None
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        name = self._keys.name_of(key.strip()) if scheme.lower() == b"bearer" else ""
        if not name:
            why = "the API key is not known here" if given else "an API key is needed: Authorization: Bearer KEY"
            return ApiError(401, why, code="invalid_api_key")
        scope[KEY_NAME] = name
        return None


async def answer(error: ApiError, send: Send) -> None:
    """Answer a request that gets no further, and close its connection."""
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]  # the body is not read
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode(error.body())})
