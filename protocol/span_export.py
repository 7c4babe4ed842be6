"""Spans on their way to a collector: made, encoded and sent in a thread of their own. Needs OpenTelemetry's packages.

A service only puts down what is to be done; making a span takes 16 µs, encoding one 18 µs. What a collector is too slow for is dropped
and counted. The SDK's BatchSpanProcessor makes and queues spans in the caller's thread, logs each one that it drops and counts none.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from protocol.counters import Counters

log = logging.getLogger("tracing")
EXPORTERS = logging.getLogger("opentelemetry.exporter")  # would say each message that was not taken, twice

WAITING = 1 << 14  # spans that may wait
BATCH = 128  # spans of one message: 4 ms of Python that other threads wait for
EXPORT_EVERY = 1.0  # seconds


class SpanQueue:
    """One thread puts, another exports. `counters`: its counts of what was dropped here, and of what the collector did not take."""

    def __init__(self, provider: TracerProvider, exporter: SpanExporter, counters: Counters) -> None:
        self._exporter = exporter
        self._counters = counters
        for name in ("spans_dropped", "spans_unsent"):
            counters.add(name, 0)  # now: two threads count, and a dictionary that is being read must not grow
        self._complaint = _Complaint()
        EXPORTERS.propagate = False
        EXPORTERS.addHandler(self._complaint)
        self._failing = False
        self._ended = _Ended()
        provider.add_span_processor(self._ended)
        self._waiting: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    def put(self, make: Callable[[], None]) -> None:
        """Let the thread make and end a span. Never waits."""
        if len(self._waiting) >= WAITING:
            self._counters.add("spans_dropped")
            return
        self._waiting.append(make)
        if len(self._waiting) == BATCH:
            self._wake.set()

    def close(self, within: float) -> None:
        """Export what there is, for so many seconds at most."""
        self._closing = True
        self._wake.set()
        self._thread.join(within)

    def _run(self) -> None:
        last = False
        while not last:
            self._wake.wait(EXPORT_EVERY)
            self._wake.clear()
            last = self._closing
            while self._waiting:
                self._export([self._waiting.popleft() for _ in range(min(len(self._waiting), BATCH))])
        self._exporter.shutdown()
        EXPORTERS.removeHandler(self._complaint)

    def _export(self, batch: list[Callable[[], None]]) -> None:
        self._complaint.text = ""
        try:
            for make in batch:
                make()
            spans, self._ended.spans = self._ended.spans, []
            if not spans:
                return
            sent = self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception as error:
            self._failed(batch, repr(error), error)
            return
        if not sent:
            self._failed(batch, self._complaint.text)
        elif self._failing:
            self._failing = False
            log.info("spans reach the collector again")

    def _failed(self, batch: list[Callable[[], None]], why: str, error: Exception | None = None) -> None:
        """Count, and say so once: a collector may be away for days."""
        self._counters.add("spans_unsent", len(batch))
        if not self._failing:
            self._failing = True
            log.warning("spans do not reach the collector, and are counted as spans_unsent until they do: %s", why, exc_info=error)


class _Complaint(logging.Handler):
    """Keeps the first thing that the exporter says of a message: the last is only that it has given up."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()


class _Ended(SpanProcessor):
    """Keeps the spans that have ended and whose trace was chosen."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        pass

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            self.spans.append(span)
