"""The admin server's process: one event loop that collects telemetry and answers scrapes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
import zmq
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pagewire.admin import AdminSettings
from pagewire.metrics import Figures
from protocol.rundir import Guard, RunDir, RunDirError
from protocol.service import Service
from protocol.telemetry import Collector

COLLECT_EVERY = 1.0  # seconds; far below what fills the socket's queue


def run(settings: AdminSettings) -> None:
    """Serve until asked to stop. Raises RunDirError if the port or the collector's endpoint is taken."""
    with Service("admin", settings.name, settings.run_dir, settings.log_level) as service, contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listen(settings))
        endpoint = settings.telemetry or service.rundir.telemetry
        stack.enter_context(Guard(endpoint))
        context: zmq.Context[Any] = stack.enter_context(zmq.Context())
        collector = stack.enter_context(contextlib.closing(Collector(endpoint, context)))
        figures = Figures()

        def collect() -> None:
            for telemetry in collector.receive():
                figures.take(telemetry, time.monotonic())

        asyncio.run(_serve(service, listening, app(service.rundir, figures), collect))


def app(rundir: RunDir, figures: Figures) -> Starlette:
    """The ASGI application."""

    async def metrics(request: Request) -> Response:
        return Response(figures.text(rundir.services()), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route("/metrics", metrics), Route("/health", health)])


def _listen(settings: AdminSettings) -> socket.socket:
    if settings.listen_fd >= 0:
        return socket.socket(fileno=settings.listen_fd)
    try:
        listening = socket.create_server(("127.0.0.1", settings.admin_port), backlog=128)
    except OSError as error:
        raise RunDirError(f"cannot listen on 127.0.0.1:{settings.admin_port}: {error.strerror}; name another with --admin-port") from None
    print(f"admin on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    return listening


async def _serve(service: Service, listening: socket.socket, application: Starlette, collect: Callable[[], None]) -> None:
    stopping = asyncio.Event()

    class Server(uvicorn.Server):
        """uvicorn without its signal handlers, the service has its own, and without its ten looks a second."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def main_loop(self) -> None:
            await stopping.wait()

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

    def stop() -> None:
        asyncio.get_running_loop().remove_reader(service.stop_fd)
        stopping.set()

    async def collecting() -> None:
        while True:
            collect()
            await asyncio.sleep(COLLECT_EVERY)

    asyncio.get_running_loop().add_reader(service.stop_fd, stop)
    collector = asyncio.create_task(collecting())
    service.state("ready")
    await server.serve([listening])
    collector.cancel()
