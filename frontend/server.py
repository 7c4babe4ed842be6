"""The frontend as a process: HTTP in front, a `Client` behind, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator

import uvicorn
import uvloop
import zmq
from starlette.applications import Starlette
from starlette.routing import Route

from frontend.api import chat, completions, service
from frontend.api.handling import HANDLERS
from frontend.client import Client
from frontend.errors import ApiError
from frontend.settings import FrontendSettings
from frontend.tokenizer import TokenizerError
from protocol.service import CannotRun, Service
from protocol.tap import Tap
from protocol.telemetry import Publisher
from protocol.tokenizer_files import BundleError

KEEP_ALIVE = 15.0  # seconds without an event after which a waiting stream gets a comment line
BEAT = 1.0  # seconds between two looks at what has become quiet, and two publications of figures
LAST_WORDS = 0.5  # seconds that clients get to read the error that ends their stream
CLOSING = 1.5  # seconds that may pass behind that until the process has ended
BACKLOG = 2048  # connections not yet accepted


def run(settings: FrontendSettings) -> None:
    """Serve until asked to stop. Raises RunDirError, and CannotRun for a port that is taken or an unusable tokenizer."""
    limit = settings.shutdown_timeout + LAST_WORDS + CLOSING
    with Service("frontend", settings.name, settings.run_dir, settings.log_level, limit) as process:
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        uvloop.run(_serve(settings, process))


def make_app(client: Client) -> Starlette:
    """The ASGI application."""
    app = Starlette(
        routes=[
            Route("/v1/completions", completions.completions, methods=["POST"]),
            Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
            Route("/generate", completions.generate, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/health", service.health),
            Route("/ready", service.ready),
        ],
        exception_handlers=HANDLERS,
    )
    app.state.client = client
    app.state.started = int(time.time())
    return app


class ProcessRecorder:
    """What the process notes about its link: the tap, the flight recorder, and the log."""

    def __init__(self, process: Service, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._process = process
        self._tap = Tap(process.rundir.tap(process.name), context)
        self.waiting = process.waiting
        self.present = process.present

    def frames(self, direction: str, endpoint: str, frames: list[bytes]) -> None:
        """Note frames that arrived or left."""
        self._process.flight.record(direction, endpoint, frames)
        self._tap.mirror(direction, frames)

    def fenced(self, reason: str) -> None:
        """Note that a session ended; while the whole deployment stops that is no surprise."""
        if not self._process.stopping.is_set():
            self._process.fenced(reason)

    def close(self) -> None:
        """Close the tap."""
        self._tap.close()


class _Server(uvicorn.Server):
    """uvicorn, without its signal handling (the process has its own) and without looking ten times a second whether to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._leave = asyncio.Event()

    def leave(self) -> None:
        """Stop accepting, and end when the streams have."""
        self.should_exit = True
        self._leave.set()

    async def main_loop(self) -> None:
        await self._leave.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(settings: FrontendSettings, process: Service) -> None:
    loop = asyncio.get_running_loop()
    listener = _listen(settings)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    recorder = ProcessRecorder(process, context)
    client = Client(settings, process.incarnation, recorder)
    publisher = Publisher(
        settings.telemetry or process.rundir.telemetry, "frontend", settings.name, process.incarnation, os.getpid(), context
    )
    server = _Server(
        uvicorn.Config(
            make_app(client),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=settings.shutdown_timeout + LAST_WORDS,  # type: ignore[arg-type]  # fractions work
        )
    )

    def stop() -> None:
        loop.remove_reader(process.stop_fd)
        process.state("stopping")
        server.leave()
        error = ApiError(503, "the server is shutting down", code="shutting_down")
        loop.call_later(settings.shutdown_timeout, client.end_streams, error)

    try:
        try:
            await client.start()
        except (BundleError, TokenizerError) as error:
            raise CannotRun(f"tokenizer {settings.tokenizer}: {error}") from None
        loop.add_reader(process.stop_fd, stop)
        beat = loop.create_task(_beat(client, process, publisher))
        serving = loop.create_task(server.serve([listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if server.started:
            host, port = listener.getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        await serving
        beat.cancel()
    finally:
        await client.stop()
        publisher.close()
        recorder.close()
        context.term()
        listener.close()


async def _beat(client: Client, process: Service, publisher: Publisher) -> None:
    """Once a second: tell what state this is, keep waiting clients alive, publish figures."""
    while True:
        if not process.stopping.is_set():
            process.state("waiting" if client.why_not_ready() else "ready")
        client.quiet_streams(KEEP_ALIVE)
        publisher.publish(client.stats())
        await asyncio.sleep(BEAT)


def _listen(settings: FrontendSettings) -> socket.socket:
    """The listening socket: the one handed over, or a new one. Raises CannotRun if the port is not to be had."""
    if settings.listen_fd >= 0:
        listener = socket.socket(fileno=settings.listen_fd)
        listener.setblocking(False)
        return listener
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise CannotRun(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener
