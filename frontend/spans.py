"""A frontend's part of traced requests: the request itself, and in it the way to token ids and the way back to text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frontend.entries import Entry, NewRequest
from protocol.tracing import Tracer


class RequestSpans:
    """Begins a span with each request, and ends it with the request. Times are of the monotonic clock.

    Attributes have the names that vLLM gives them.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(self, new: NewRequest, parent: str, arrived: float, now: float) -> tuple[NewRequest, Any]:
        """The request with what the other services are to know, and its span. `parent`: the client's traceparent."""
        span = self._tracer.begin("request", parent, arrived)
        trace = self._tracer.traceparent(span)
        if trace:
            self._tracer.span("tokenize", trace, arrived, now)
        return replace(new, trace=trace), span

    def end(self, entry: Entry, now: float) -> None:
        """The request is over."""
        first = entry.first_token if entry.first_token > 0 else 0.0
        if first and entry.new.trace:
            self._tracer.span("detokenize", entry.new.trace, first, now)
        attributes: dict[str, str | int | float] = {
            "gen_ai.request.id": entry.request.hex(),
            "gen_ai.response.model": entry.new.model,
            "gen_ai.request.n": len(entry.choices),
            "gen_ai.request.max_tokens": entry.new.params.max_tokens,
            "gen_ai.usage.prompt_tokens": entry.prompt_tokens,
            "gen_ai.usage.completion_tokens": sum(len(choice.tokens) for choice in entry.choices),
            "gen_ai.response.finish_reasons": ",".join(entry.endings),
            "gen_ai.latency.e2e": now - entry.arrived,
        }
        if first:
            attributes["gen_ai.latency.time_to_first_token"] = first - entry.arrived
        if entry.queued >= 0:
            attributes["gen_ai.latency.time_in_queue"] = entry.queued
        self._tracer.end(entry.span, now, attributes, entry.error.code if entry.error is not None else "")
