"""Spans go to the collector without the service's waiting for it; what does not get there is counted."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from protocol import span_export, tracing
from protocol.counters import Counters
from protocol.span_export import BATCH
from protocol.tracing import Tracer

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CHOSEN, UNCHOSEN = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


class Collector(ThreadingHTTPServer):
    """Takes spans once `open` is set. `sizes`: spans of each message that it took."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.open = threading.Event()
        self.status = 200
        self.sizes: list[int] = []
        self.names: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        spans = [span for resource in message.resource_spans for scope in resource.scope_spans for span in scope.spans]
        self.server.open.wait(60)
        if self.server.status == 200:
            self.server.sizes.append(len(spans))
            self.server.names += [span.name for span in spans]
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.open.set()
    made.shutdown()
    made.server_close()
    thread.join(60)


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What the log of a service would get: `caplog` listens at loggers that pass nothing on, too."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = records.append  # type: ignore[method-assign]
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield records
    root.setLevel(level)
    root.removeHandler(handler)


def eventually(condition) -> None:
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def test_a_stuck_collector_holds_nobody_up_and_what_is_dropped_is_counted(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "WAITING", 200)
    monkeypatch.setattr(tracing, "TIMEOUT", 60)
    counters = Counters()
    made = Tracer(collector.url, "frontend", "f", counters)
    for _ in range(3000):  # ends, although nothing is taken meanwhile
        made.span("s", CHOSEN, 1.0, 2.0)
    assert not collector.sizes
    assert counters["spans_dropped"] > 0
    collector.open.set()
    eventually(lambda: sum(collector.sizes) + counters["spans_dropped"] == 3000)
    assert max(collector.sizes) <= BATCH
    assert counters["spans_unsent"] == 0
    made.close()


def test_what_the_collector_refuses_is_counted(collector: Collector) -> None:
    collector.open.set()
    collector.status = 400
    counters = Counters()
    made = Tracer(collector.url, "frontend", "f", counters)
    for _ in range(10):
        made.span("s", CHOSEN, 1.0, 2.0)
    made.close()
    eventually(lambda: counters["spans_unsent"] == 10)
    assert counters["spans_dropped"] == 0


@pytest.mark.slow
def test_a_collector_that_is_away_is_said_once_and_once_that_it_is_back(collector: Collector, logged: list[logging.LogRecord]) -> None:
    collector.open.set()
    counters = Counters()
    made = Tracer(collector.url, "frontend", "f", counters)

    def one_message(counted: int) -> None:
        made.span("s", CHOSEN, 1.0, 2.0)
        eventually(lambda: sum(collector.sizes) + counters["spans_unsent"] == counted)

    for status in (400, 503, 400):
        collector.status = status
        one_message(counters["spans_unsent"] + 1)
    assert counters["spans_unsent"] == 3
    [away] = logged
    assert (away.levelname, away.name) == ("WARNING", "tracing")
    assert "counted as spans_unsent" in away.getMessage()
    assert "Bad Request" in away.getMessage()
    collector.status = 200

    def again() -> list[str]:
        made.span("s", CHOSEN, 1.0, 2.0)
        return [record.getMessage() for record in logged[1:]]

    eventually(lambda: again() == ["spans reach the collector again"])
    taken = len(collector.sizes)
    eventually(lambda: again() and len(collector.sizes) > taken + 1)
    made.close()
    assert [record.getMessage() for record in logged[1:]] == ["spans reach the collector again"]


@pytest.mark.slow
def test_it_is_said_why_a_collector_is_not_reached(logged: list[logging.LogRecord]) -> None:
    counters = Counters()
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    made = Tracer(f"http://127.0.0.1:{port}/v1/traces", "frontend", "f", counters)
    for count in (1, 2):
        made.span("s", CHOSEN, 1.0, 2.0)
        eventually(lambda count=count: counters["spans_unsent"] == count)
    made.close()
    [away] = logged
    assert "refused" in away.getMessage()


def test_what_there_is_goes_out_at_the_end_but_nothing_of_traces_that_were_not_chosen(collector: Collector) -> None:
    collector.open.set()
    made = Tracer(collector.url, "frontend", "f", Counters())
    request = made.begin("request", CHOSEN, 1.0)
    made.span("child", made.traceparent(request), 1.0, 2.0)
    made.end(request, 2.0, {"a": 1}, "failed")
    made.span("unchosen", UNCHOSEN, 1.0, 2.0)
    made.close()
    eventually(lambda: sorted(collector.names) == ["child", "request"])


def test_a_span_that_cannot_be_made_ends_no_thread(collector: Collector) -> None:
    collector.open.set()
    counters = Counters()
    made = Tracer(collector.url, "frontend", "f", counters)
    made._queue.put(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    eventually(lambda: counters["spans_unsent"] == 1)
    made.span("next", CHOSEN, 1.0, 2.0)
    made.close()
    eventually(lambda: collector.names == ["next"])


def test_clocks_between_which_the_thread_stood_still_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    second, epoch = 10**9, 10**18
    monotonic, clock = iter([0, 3 * second, 3 * second, 3 * second + 10]), iter([epoch, epoch + 3 * second])
    monkeypatch.setattr(tracing, "time", SimpleNamespace(monotonic_ns=monotonic.__next__, time_ns=clock.__next__))
    assert tracing.wall(2.0) == epoch + 2 * second
