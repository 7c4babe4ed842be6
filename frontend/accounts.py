"""How every HTTP request ended: counted once, by path, by the status sent, and by the code of what went wrong."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Sequence

from starlette.routing import Route

from frontend.access import ENDING, App, Message, Receive, Scope, Send, answer
from frontend.errors import ApiError
from protocol.series import Histogram, Series

BEGUN = "pagewire.begun"  # where the scope says when the request came, on the monotonic clock
OK = "ok"
CLIENT_GONE = "client_gone"
CANCELLED = "cancelled"  # by the server, which ends
MOVED = "moved"  # another frontend goes on with the stream
NO_HTTP = "invalid_http"
OTHER = "other"  # the path of requests for what is not there


class Accounts:
    """The counts of one frontend process."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._paths = {route.path for route in routes}
        self._patterns: dict[object, str] = {route.endpoint: route.path_format for route in routes if "{" in route.path}
        self._ended: Counter[tuple[str, str, str]] = Counter()  # path, status, code
        self._seconds: dict[str, Histogram] = {}

    def path_of(self, scope: Scope) -> str:
        """The path as the API describes it, so that there are few."""
        path: str = scope["path"]
        return path if path in self._paths else self._patterns.get(scope.get("endpoint"), OTHER)

    def ended(self, scope: Scope, status: int) -> None:
        """A request has ended; `status` is what was sent, 0 if nothing was."""
        path = self.path_of(scope)
        self._ended[path, str(status), scope.get(ENDING, OK)] += 1
        if path not in self._seconds:
            self._seconds[path] = Histogram("pagewire_http_request_duration_seconds")
        self._seconds[path].observe(time.monotonic() - scope[BEGUN])

    def refused(self, error: ApiError) -> None:
        """Something came that is no HTTP request, or too long for one, and was refused."""
        self._ended[OTHER, str(error.status), error.code] += 1

    def series(self) -> list[Series]:
        """Samples of the families."""
        counts = [Series("pagewire_http_requests", list(labels), float(n)) for labels, n in self._ended.items()]
        return counts + [seconds.series([path]) for path, seconds in self._seconds.items()]


class Counted:
    """ASGI, around everything else that answers: notes when a request came, and counts its end."""

    def __init__(self, app: App, accounts: Accounts) -> None:
        self._app = app
        self._accounts = accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[BEGUN] = time.monotonic()
        status = 0

        def noting(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:  # the only one who does so is a server that waits for nobody any more
            scope.setdefault(ENDING, CANCELLED)
            if not status:
                await answer(ApiError(503, "the server is shutting down", code="shutting_down"), noting)
        except Exception:  # answered by Starlette's outermost layer
            scope[ENDING], status = "internal_error", status or 500
            raise
        finally:
            self._accounts.ended(scope, status)
