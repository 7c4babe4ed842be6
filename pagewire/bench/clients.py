"""Client processes that share a workload, start together and report what they saw."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import SplitResult, urlsplit

from pagewire.bench.exchange import Exchange, Record
from pagewire.bench.workloads import Request, follow

START_DELAY = 0.3  # seconds between the last client's readiness and the first arrival
REPORT_EVERY = 0.1  # seconds between two reports of a client's progress


class ClientDied(RuntimeError):
    """A client process ended before its records were handed over."""


@dataclass(frozen=True)
class Target:
    """The server: where its /v1 is, which path is asked, and how."""

    url: str
    path: str = "/v1/completions"
    key: str = ""
    stream: bool = True


def measure(
    target: Target,
    requests: Sequence[Request],
    processes: int = 2,
    concurrency: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Record]:
    """Send the requests from several processes; the records of all, by start. Raises ClientDied.

    concurrency: most requests (conversations) under way at once; 0: no bound. progress: called with the number of requests
    that have ended since the last call.
    """
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    started = []
    count = max(1, min(processes, len(requests), concurrency or processes))
    try:
        for i in range(count):
            ours, theirs = context.Pipe()
            share = concurrency // count + (i < concurrency % count) if concurrency else 0
            process = context.Process(target=_client, args=(theirs, target, requests[i::count], share), daemon=True)
            with _deaf():
                process.start()
            theirs.close()
            pipes.append(ours)
            started.append(process)
        for pipe in pipes:
            pipe.recv()
        start = time.perf_counter() + START_DELAY
        for pipe in pipes:
            pipe.send(start)
        records = _gather(pipes, progress or (lambda ended: None))
        for process in started:
            process.join(5)
    except (EOFError, ConnectionError):
        raise ClientDied("a client process died") from None
    finally:
        for process in started:
            if process.is_alive():  # of what is not waited for, nothing is wanted
                process.kill()
                process.join()
    return sorted(records, key=lambda record: record.start)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes started here ignore Ctrl-C, which a terminal sends to all: their starter ends them."""
    if threading.current_thread() is not threading.main_thread():  # only there may signals be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _gather(pipes: list[Connection], progress: Callable[[int], None]) -> list[Record]:
    """Progress as it comes, then each client's records."""
    records: list[Record] = []
    open_pipes = list(pipes)
    while open_pipes:
        for pipe in multiprocessing.connection.wait(open_pipes):
            assert isinstance(pipe, Connection)
            said = pipe.recv()
            if isinstance(said, int):
                progress(said)
            else:
                records += said
                open_pipes.remove(pipe)
    return records


def _client(pipe: Connection, target: Target, requests: Sequence[Request], concurrency: int) -> None:
    """A client process: says that it is ready, gets the start time, reports how many have ended, then its records."""
    url = urlsplit(target.url)
    head = f"POST {url.path.rstrip('/')}{target.path} HTTP/1.1\r\nHost: {url.netloc}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n"
    if target.key:
        head += f"Authorization: Bearer {target.key}\r\n"
    head += "Content-Length: {length}\r\n\r\n"
    ended = 0
    reported = 0.0

    def one_ended() -> None:
        nonlocal ended, reported
        ended += 1
        now = time.perf_counter()
        if now - reported > REPORT_EVERY:
            pipe.send(ended)
            ended, reported = 0, now

    async def main() -> list[Record]:
        limit = asyncio.Semaphore(concurrency or len(requests) or 1)
        pipe.send("ready")
        start = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        talks = (_conversation(url, head, request, start, limit, target.stream, one_ended) for request in requests)
        return [record for records in await asyncio.gather(*talks) for record in records]

    try:
        import uvloop

        records = uvloop.run(main())
    except ImportError:
        records = asyncio.run(main())
    pipe.send(ended)
    pipe.send(records)


async def _conversation(
    url: SplitResult, head: str, request: Request, start: float, limit: asyncio.Semaphore, stream: bool, ended: Callable[[], None]
) -> list[Record]:
    await asyncio.sleep(max(0.0, start + request.at - time.perf_counter()))
    records: list[Record] = []
    body = request.body
    async with limit:
        for turn in (*request.then, None):
            record, answer = await _exchange(url, head, body, stream, bool(request.then))
            record.turn = len(records)
            records.append(record)
            ended()
            if record.error or turn is None:
                break
            body = follow(body, answer, turn)
    return records


async def _exchange(url: SplitResult, head: str, body: bytes, stream: bool, keep: bool) -> tuple[Record, str]:
    record = Record(time.perf_counter())
    header = head.format(length=len(body)).encode()
    context: Any = ssl.create_default_context() if url.scheme == "https" else None
    port = url.port or (443 if context else 80)
    try:
        _, exchange = await asyncio.get_running_loop().create_connection(
            lambda: Exchange(header, body, record, stream, keep), url.hostname or "", port, ssl=context
        )
    except (OSError, ValueError) as error:  # of a name that is none, too
        record.error = f"cannot connect: {error}"
        return record, ""
    await exchange.done
    return record, exchange.answer
