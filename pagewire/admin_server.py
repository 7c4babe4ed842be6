"""The admin server's process: one event loop that collects telemetry, answers scrapes and serves the live page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import uvicorn
import zmq
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from pagewire import handover
from pagewire.admin import AdminSettings
from pagewire.ask import AskError, ask
from pagewire.finding import API, is_url
from pagewire.host_guard import HostGuard, host_names
from pagewire.metrics import Figures
from pagewire.monitor import Monitor
from pagewire.trace import chrome, services
from pagewire.watch import Watch
from protocol.endpoints import http_url
from protocol.files import RunDirError
from protocol.locks import Guard
from protocol.registration import process_start
from protocol.rundir import RunDir
from protocol.service import CannotRun, Service, tell
from protocol.telemetry import Collector, Telemetry

COLLECT_EVERY = 2.0  # seconds, while nobody asks; far below what fills the socket's queue
NOTICED = 1.5  # seconds after which every service has seen whether somebody traces, and published what it noted
LONGEST_TRACE = 60.0  # seconds
STARTED_TOGETHER = 1000  # clock ticks, 10 s: a service older than that may have worked before this one listened
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"index.html": "text/html", "style.css": "text/css", "page.js": "text/javascript"}
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def run(settings: AdminSettings) -> None:
    """Serve until asked to stop.

    Raises RunDirError if the port or the collector's endpoint is taken, CannotRun for a host or an API that is none.
    """
    names = host_names(settings.admin_hosts)
    if settings.api and not is_url(settings.api):
        raise CannotRun(f"--api {settings.api}: no URL such as {API}")
    process = Service("admin", settings.name, settings.run_dir, settings.log_level, drains=True, log_format=settings.log_format)
    with process as service, contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listen(settings))
        endpoint = settings.telemetry or service.rundir.telemetry
        stack.enter_context(Guard(endpoint))
        context: zmq.Context[Any] = stack.enter_context(zmq.Context())
        collector = stack.enter_context(contextlib.closing(Collector(endpoint, context)))
        figures = Figures()
        left = service.rundir.path / "monitor.json"
        together = process_start(os.getpid()) - STARTED_TOGETHER
        # Of one that has ended already nothing is known (0): it is counted, since most are of our age.
        monitor = Monitor(time.monotonic(), lambda telemetry: 0 < process_start(telemetry.pid) < together, handover.take_up(left))
        watch = Watch(figures, monitor)
        this = psutil.Process()

        def collect() -> None:
            now = time.monotonic()
            own = {"memory_bytes": float(this.memory_info().rss)}
            figures.take(Telemetry("admin", settings.name, service.incarnation, os.getpid(), own), now)
            for telemetry in collector.receive():
                figures.take(telemetry, now)
                monitor.take(telemetry)
            monitor.sample(now)
            watch.look(service.rundir.services(), now)

        def sum_up() -> None:
            """The last thing to do: whoever still asks is not waited for."""
            collect()
            now = time.monotonic()
            if service.stopping.is_set():
                tell("summary " + json.dumps({name: round(value, 4) for name, value in monitor.summary(now).items()}))
            else:
                handover.leave(left, monitor.sums(now))
            service.request_stop()  # from here on it must not take long

        recorder = Recorder(collector, collect)
        application = app(service.rundir, collect, figures, monitor, watch, recorder, settings.api)
        asyncio.run(_serve(service, listening, HostGuard(application, names), collect, sum_up))


class Recorder:
    """Switches the services' spans on for some seconds, for one reader at a time."""

    def __init__(self, collector: Collector, collect: Callable[[], None]) -> None:
        self._collector = collector
        self._collect = collect
        self.busy = False

    async def record(self, seconds: float) -> dict[str, Any]:
        """Chrome's trace of the next `seconds`, once every service has noticed."""
        self.busy = True
        self._collector.trace(True)
        try:
            await asyncio.sleep(NOTICED)
            begin = time.monotonic()
            await asyncio.sleep(seconds)
            end = time.monotonic()
            await asyncio.sleep(NOTICED)
            self._collect()
            return chrome(services(self._collector.spans), begin, end)
        finally:
            self._collector.trace(False)
            self.busy = False


def app(
    rundir: RunDir, collect: Callable[[], None], figures: Figures, monitor: Monitor, watch: Watch, recorder: Recorder, api: str
) -> Starlette:
    """The ASGI application. `collect` brings the figures up to date."""

    async def metrics(request: Request) -> Response:
        collect()
        return Response(figures.text(rundir.services()), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def rolling(request: Request) -> Response:
        collect()
        return JSONResponse(monitor.figures())

    async def state(request: Request) -> Response:
        collect()
        return JSONResponse(watch.picture(time.monotonic()), headers={"Cache-Control": "no-store"})

    async def trace(request: Request) -> Response:
        try:
            seconds = float(request.query_params.get("seconds", "5"))
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= LONGEST_TRACE:
            return JSONResponse({"error": {"message": f"seconds must be a number up to {LONGEST_TRACE:g}"}}, 400)
        if recorder.busy:
            return JSONResponse({"error": {"message": "somebody records a trace already"}}, 409)
        return JSONResponse(await recorder.record(seconds))

    async def page(request: Request) -> Response:
        name = request.url.path.lstrip("/") or "index.html"
        return Response((PAGE / name).read_bytes(), media_type=PAGE_FILES[name], headers=PAGE_HEADERS)

    async def prompt(request: Request) -> Response:
        if request.headers.get("content-type") != "application/json":  # what another site's page cannot send unasked
            return JSONResponse({"error": {"message": "Content-Type must be application/json"}}, 415)
        if not api:
            return JSONResponse({"error": {"message": "this admin server knows no API: start it with --api URL"}}, 503)
        try:
            body = await request.json()
            if not isinstance(body, dict):
                raise ValueError("the body must be an object")
            status, parts = await ask(api, body, request.headers.get("x-api-key", ""))
        except (ValueError, RecursionError) as error:
            return JSONResponse({"error": {"message": str(error)}}, 400)
        except AskError as error:
            return JSONResponse({"error": {"message": str(error)}}, 502)
        return StreamingResponse(parts, status, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/health", health),
            Route("/monitor", rolling),
            Route("/state", state),
            Route("/trace", trace),
            Route("/prompt", prompt, methods=["POST"]),
            Route("/", page),
            *(Route(f"/{name}", page) for name in PAGE_FILES),
        ]
    )


def _listen(settings: AdminSettings) -> socket.socket:
    if settings.listen_fd >= 0:
        return socket.socket(fileno=settings.listen_fd)
    try:
        listening = socket.create_server(("127.0.0.1", settings.admin_port), backlog=128)
    except OSError as error:
        why = os.strerror(error.errno or 0)  # its own text has the address once more
        raise RunDirError(f"cannot listen on 127.0.0.1:{settings.admin_port}: {why}; name another with --admin-port") from None
    tell(f"admin on {http_url(listening)}")
    return listening


async def _serve(
    service: Service, listening: socket.socket, application: ASGIApp, collect: Callable[[], None], sum_up: Callable[[], None]
) -> None:
    ending = asyncio.Event()

    class Server(uvicorn.Server):
        """uvicorn without its signal handlers, the service has its own, and without its ten looks a second."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def main_loop(self) -> None:
            await ending.wait()
            sum_up()

    config = uvicorn.Config(
        application,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        date_header=False,
        timeout_graceful_shutdown=1,
    )
    server = Server(config)

    def end(fd: int) -> None:
        asyncio.get_running_loop().remove_reader(fd)
        ending.set()

    async def collecting() -> None:
        while True:
            collect()
            await asyncio.sleep(COLLECT_EVERY)

    for fd in (service.stop_fd, service.drain_fd):
        asyncio.get_running_loop().add_reader(fd, end, fd)
    collector = asyncio.create_task(collecting())
    service.serves(http_url(listening))
    service.state("ready")
    await server.serve([listening])
    collector.cancel()
