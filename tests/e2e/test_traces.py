"""OpenTelemetry: one request, spans of three services, one trace; received by a collector on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from protocol.counters import Counters
from protocol.service import CannotRun
from protocol.tracing import Tracer, tracer
from tests.e2e.stack import Stack, eventually, stack

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


SLACK = 1_000_000  # nanoseconds: each span's times are put on the wall clock by themselves


@dataclass
class Collector:
    """Takes OTLP over HTTP. spans: (service, span)."""

    url: str = ""
    spans: list[tuple[str, Any]] = field(default_factory=list)

    def of(self, trace: str) -> dict[tuple[str, str], list[Any]]:
        found: dict[tuple[str, str], list[Any]] = {}
        for service, span in list(self.spans):
            if span.trace_id.hex() == trace:
                found.setdefault((service, span.name), []).append(span)
        return found


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
                made.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join(60)


@pytest.fixture(scope="module")
def traced(collector: Collector) -> Iterator[Stack]:
    with stack() as made:
        made.up("--runner", "oracle", "--otlp-traces-endpoint", collector.url)
        yield made


def ask(made: Stack, traceparent: str = "", **fields: Any) -> httpx.Response:
    headers = {"traceparent": traceparent} if traceparent else {}
    body = {"prompt": "a prompt", "max_tokens": 30, "ignore_eos": True, **fields}
    return httpx.post(f"{made.url}/v1/completions", json=body, headers=headers, timeout=60)


FRONTEND, SCHEDULER, WORKER = "pagewire-frontend", "pagewire-scheduler", "pagewire-worker"


@pytest.mark.slow
def test_a_request_is_one_trace_over_three_services(collector: Collector, traced: Stack) -> None:
    assert ask(traced, f"00-{TRACE}-{PARENT}-01", n=2).status_code == 200
    names = {
        *((FRONTEND, name) for name in ("request", "tokenize", "detokenize")),
        (SCHEDULER, "queue"),
        *((WORKER, name) for name in ("prefill", "decode")),
    }

    def whole() -> dict[tuple[str, str], list[Any]] | None:
        """Spans come in their services' own time, and a worker's of two choices in two messages."""
        found = collector.of(TRACE)
        return found if set(found) >= names and all(len(found[WORKER, name]) > 1 for name in ("prefill", "decode")) else None

    found = eventually(whole)
    assert set(found) == names
    [request] = found[FRONTEND, "request"]
    assert request.parent_span_id.hex() == PARENT
    for where, spans in found.items():
        assert len(spans) == (2 if where[0] == WORKER else 1), where  # of a worker one for each choice
        for span in spans:
            assert span.start_time_unix_nano <= span.end_time_unix_nano
            if span is not request:
                assert span.parent_span_id == request.span_id
                # services on one host have one clock; a worker's record may be dropped after the answer
                assert request.start_time_unix_nano - SLACK <= span.start_time_unix_nano <= request.end_time_unix_nano + SLACK
    [queue], [tokenize] = found[SCHEDULER, "queue"], found[FRONTEND, "tokenize"]
    assert tokenize.end_time_unix_nano <= queue.end_time_unix_nano + SLACK
    for prefill, decode in zip(found[WORKER, "prefill"], found[WORKER, "decode"], strict=True):
        assert queue.start_time_unix_nano <= prefill.start_time_unix_nano + SLACK
        assert abs(prefill.end_time_unix_nano - decode.start_time_unix_nano) <= SLACK
        assert decode.end_time_unix_nano > decode.start_time_unix_nano
        assert {a.key: a.value.int_value for a in decode.attributes}["gen_ai.usage.completion_tokens"] == 30
    attributes = {a.key: a.value for a in request.attributes}
    assert attributes["gen_ai.usage.completion_tokens"].int_value == 60
    assert attributes["gen_ai.request.n"].int_value == 2
    assert attributes["gen_ai.response.finish_reasons"].string_value == "length,length"


@pytest.mark.slow
def test_a_request_without_a_parent_begins_a_trace_and_an_unchosen_one_is_left_alone(collector: Collector, traced: Stack) -> None:
    unchosen = "a" * 32
    assert ask(traced, f"00-{unchosen}-{PARENT}-00").status_code == 200
    assert ask(traced, "no traceparent at all").status_code == 200
    begun = eventually(lambda: [span for _, span in list(collector.spans) if span.name == "request" and span.trace_id.hex() != TRACE])
    eventually(lambda: (WORKER, "decode") in collector.of(begun[0].trace_id.hex()))
    assert begun[0].parent_span_id == b""
    assert not collector.of(unchosen)


@pytest.mark.slow
def test_a_collector_that_is_not_there_holds_nothing_up() -> None:
    with stack() as made:
        up = made.up("--runner", "oracle", "--otlp-traces-endpoint", "http://127.0.0.1:9/v1/traces")
        assert ask(made).status_code == 200
        up.popen.terminate()
        assert up.popen.wait(60) == 0


def test_without_the_packages_the_flag_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracer("", "frontend", "frontend-0", Counters()) is None
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(CannotRun, match=r"pagewire\[otel\]"):
        Tracer("http://127.0.0.1:9/v1/traces", "frontend", "frontend-0", Counters())
