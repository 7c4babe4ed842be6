"""The frontend as a process: HTTP in front, a `Client` behind, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import time
from collections.abc import Iterator

import psutil
import uvicorn
import uvloop
import zmq
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from frontend.access import ApiKeys, Guard, check_exposure, check_tls
from frontend.accounts import Accounts, Counted
from frontend.api.handling import HANDLERS
from frontend.api.routes import ROUTES
from frontend.client import Client
from frontend.errors import ApiError
from frontend.http_protocol import HttpProtocol
from frontend.settings import FrontendSettings
from frontend.spans import RequestSpans
from frontend.tokenizer import TokenizerError
from protocol.endpoints import http_url
from protocol.service import CannotRun, Service, tell
from protocol.tap import Tap
from protocol.telemetry import Publisher
from protocol.tokenizer_files import BundleError
from protocol.tracing import tracer

log = logging.getLogger("frontend")

KEEP_ALIVE = 15.0  # seconds without an event after which a waiting stream gets a comment line
BEAT = 1.0  # seconds between two looks at what has become quiet, and two publications of figures
LAST_WORDS = 0.5  # seconds that clients get to read the error that ends their stream
CLOSING = 1.5  # seconds that may pass behind that until the process has ended
ACCEPTED = 0.5  # seconds that an accepted connection gets to send its request to a frontend that drains
JOINING = 3.0  # seconds after which a frontend of a shared port accepts though it is not ready: perhaps nobody else does
BACKLOG = 2048  # connections not yet accepted


def run(settings: FrontendSettings) -> None:
    """Serve until asked to stop. Raises RunDirError, and CannotRun for a port that is taken or an unusable tokenizer."""
    check_exposure(settings.host, settings.api_key_file, settings.auth)
    check_tls(settings.ssl_certfile, settings.ssl_keyfile)
    limit = settings.shutdown_timeout + LAST_WORDS + CLOSING
    with Service(
        "frontend", settings.name, settings.run_dir, settings.log_level, limit, drains=True, log_format=settings.log_format
    ) as process:
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        raise_file_limit()
        uvloop.run(_serve(settings, process))


def raise_file_limit() -> None:
    """As many open files as the system lets this process have: each connection is one, and shells and containers begin with 1,024."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError) as error:  # a hard limit beyond what the system allows
        log.warning("%d open files stay the limit: %s", soft, error)


def make_app(client: Client) -> Starlette:
    """The ASGI application. Raises CannotRun for a file of API keys that cannot be used."""
    settings = client.settings
    keys = ApiKeys.read(settings.api_key_file) if settings.api_key_file else None
    accounts = Accounts(ROUTES)
    middleware = [Middleware(Guard, keys)]
    if origins := [origin for origin in settings.cors_origins.replace(",", " ").split() if origin]:
        # around the guard: a browser asks for permission without a key
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]))
    middleware.insert(0, Middleware(Counted, accounts))
    app = Starlette(
        middleware=middleware,
        routes=ROUTES,
        exception_handlers=HANDLERS,
    )
    app.router.redirect_slashes = False  # to a host that the client's own header names
    app.state.client = client
    app.state.accounts = accounts
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
        self.draining = False
        self._leave = asyncio.Event()

    def leave(self) -> None:
        """Stop accepting, and end when the streams have."""
        self.should_exit = True
        self._leave.set()

    def give_up(self) -> None:
        """Wait for nobody any more, though it was to drain for longer."""
        self.force_exit = True
        for task in self.server_state.tasks:
            task.cancel()

    async def main_loop(self) -> None:
        await self._leave.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting; what has been accepted may still be sending its request, and is not turned away."""
        if self.draining:
            for server in self.servers:
                server.close()
            await asyncio.sleep(ACCEPTED)
        await super().shutdown(sockets)


async def _serve(settings: FrontendSettings, process: Service) -> None:
    loop = asyncio.get_running_loop()
    process.hear_signals()
    listener = _listen(settings)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    recorder = ProcessRecorder(process, context)
    client = Client(settings, process.incarnation, recorder)
    publisher = Publisher(
        settings.telemetry or process.rundir.telemetry, "frontend", settings.name, process.incarnation, os.getpid(), context
    )
    client.link.trace = publisher.trace
    client.changed = lambda: _say_state(client, process)
    traces = tracer(settings.otlp_traces_endpoint, "frontend", settings.name, client.counters)
    if traces is not None:
        client.spans = RequestSpans(traces)
    app = make_app(client)
    server = _Server(
        uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            ssl_certfile=settings.ssl_certfile or None,
            ssl_keyfile=settings.ssl_keyfile or None,
            timeout_graceful_shutdown=settings.shutdown_timeout + LAST_WORDS,  # type: ignore[arg-type]  # fractions work
        )
    )

    def stop() -> None:
        loop.remove_reader(process.stop_fd)
        process.state("stopping")
        server.leave()
        error = ApiError(503, "the server is shutting down", code="shutting_down")

        def end() -> None:
            client.end_streams(error)
            loop.call_later(LAST_WORDS, server.give_up)  # counted from the error: a machine that stood still does not eat it

        loop.call_later(settings.shutdown_timeout, end)

    def drain() -> None:
        loop.remove_reader(process.drain_fd)
        process.state("draining")
        process.log.info("draining: no new requests, %d streams", len(client.journal.entries()))
        server.config.timeout_graceful_shutdown = settings.drain_timeout + LAST_WORDS  # type: ignore[assignment]
        server.draining = True
        server.leave()
        error = ApiError(503, "this frontend is being replaced", code="shutting_down")
        loop.call_later(settings.drain_timeout, client.end_streams, error)

    try:
        try:
            await client.start()
        except (BundleError, TokenizerError) as error:
            raise CannotRun(f"tokenizer {settings.tokenizer}: {error}") from None
        loop.add_reader(process.stop_fd, stop)
        loop.add_reader(process.drain_fd, drain)
        _say_state(client, process)
        beat = loop.create_task(_beat(app, process, publisher))
        if settings.listen_fd >= 0:
            await _ready_to_accept(client, process)
        url = http_url(listener, "https" if settings.ssl_certfile else "http")  # told to stop at once, the server closes the socket
        serving = loop.create_task(server.serve([listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if server.started:
            process.serves(url)
            tell(f"listening on {url}")
        await serving
        beat.cancel()
        _publish(app, publisher)
    finally:
        await client.stop()
        if traces is not None:
            traces.close()
        publisher.close()
        recorder.close()
        context.term()
        listener.close()


async def _ready_to_accept(client: Client, process: Service) -> None:
    """Behind a shared port, leave connections to those who can serve them, as long as that may be expected to be others."""
    for _ in range(int(JOINING / 0.02)):
        if not client.why_not_ready() or process.stopping.is_set() or process.draining.is_set():
            return
        await asyncio.sleep(0.02)


def _say_state(client: Client, process: Service) -> None:
    if not (process.stopping.is_set() or process.draining.is_set()):
        process.state("waiting" if client.why_not_ready() else "ready")


async def _beat(app: Starlette, process: Service, publisher: Publisher) -> None:
    """Once a second: keep waiting clients alive, publish figures."""
    client: Client = app.state.client
    while True:
        client.quiet_streams(KEEP_ALIVE)
        _publish(app, publisher)
        await asyncio.sleep(BEAT)


def _publish(app: Starlette, publisher: Publisher) -> None:
    client: Client = app.state.client
    values = {**client.stats(), "memory_bytes": float(psutil.Process().memory_info().rss)}
    publisher.publish(values, client.series() + app.state.accounts.series(), served=client.served())


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
    except UnicodeError:
        raise CannotRun(f"cannot listen on {settings.host}:{settings.port}: no name of a host") from None
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener
