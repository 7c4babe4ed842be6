"""OpenTelemetry spans of requests, if `--otlp-traces-endpoint` names a collector (extra `pagewire[otel]`).

Every service exports the spans of its own part, as `service.name` pagewire-ROLE, over OTLP/HTTP. What ties them together
is the W3C `traceparent` of the request's span: the client's on the way in, then a field of SUBMIT and of a plan's ADMIT.
Services measure on their monotonic clock, and a span is made when its end is known.
"""

from __future__ import annotations

import time
from typing import Any

from protocol.counters import Counters
from protocol.service import CannotRun

LAST_WORDS = 0.3  # seconds that a closing service waits for its collector
TIMEOUT = 2  # seconds of one message to it, and of repeating that
TOGETHER = 100_000  # nanoseconds between two readings of the monotonic clock, within which a reading of the other one belongs to both


class Tracer:
    """A service's way to the collector, for one thread; nothing here waits for it. Raises CannotRun if the packages are not there.

    counters: where spans that did not get there are counted, see `protocol.span_export`.
    """

    def __init__(self, endpoint: str, role: str, name: str, counters: Counters) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            from protocol.span_export import SpanQueue
        except ImportError as error:
            raise CannotRun(f"--otlp-traces-endpoint needs OpenTelemetry ({error}): install pagewire[otel]") from None
        self._propagator = TraceContextTextMapPropagator()
        provider = TracerProvider(resource=Resource.create({"service.name": f"pagewire-{role}", "service.instance.id": name}))
        self._queue = SpanQueue(provider, OTLPSpanExporter(endpoint=endpoint, timeout=TIMEOUT), counters)
        self._tracer = provider.get_tracer("pagewire")

    def begin(self, name: str, parent: str, at: float) -> Any:
        """A span that others will be children of, begun at a time of the monotonic clock. An unusable parent is none."""
        return self._start(name, parent, wall(at))

    def traceparent(self, span: Any) -> str:
        """What children are to be told; empty if the span is not recorded, since its trace was not chosen to be."""
        if not span.is_recording():
            return ""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier["traceparent"]

    def end(self, span: Any, at: float, attributes: dict[str, str | int | float], error: str = "") -> None:
        """End a span that has been begun."""
        ended = wall(at)
        self._queue.put(lambda: _end(span, ended, attributes, error))

    def span(self, name: str, parent: str, begin: float, end: float, attributes: dict[str, str | int | float] | None = None) -> None:
        """A whole span, a child of the traceparent."""
        begun, ended = wall(begin), wall(end)
        self._queue.put(lambda: _end(self._start(name, parent, begun), ended, attributes or {}, ""))

    def close(self) -> None:
        """Export what there is, unless the collector takes too long."""
        self._queue.close(LAST_WORDS)

    def _start(self, name: str, parent: str, at: int) -> Any:
        from opentelemetry.context import Context

        return self._tracer.start_span(name, self._propagator.extract({"traceparent": parent}, Context()), start_time=at)


def tracer(endpoint: str, role: str, name: str, counters: Counters) -> Tracer | None:
    """The service's tracer; None if no endpoint is named. Raises CannotRun as Tracer does."""
    return Tracer(endpoint, role, name, counters) if endpoint else None


def _end(span: Any, at: int, attributes: dict[str, str | int | float], error: str) -> None:
    span.set_attributes(attributes)
    if error:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, error))
    span.end(at)


def wall(at: float) -> int:
    """A time of the monotonic clock, in nanoseconds since 1970."""
    while True:
        before, now, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        if after - before < TOGETHER:  # else this thread stood still between the clocks
            return now - before + int(at * 1e9)
