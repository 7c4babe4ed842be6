"""A worker's part of traced requests: from plans and results it sees when a record's prefill and decode begin and end."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.columns import unpack
from protocol.messages import Plan, Result
from protocol.tracing import Tracer


@dataclass(slots=True)
class _Traced:
    traceparent: str
    begun: float
    first: float = 0.0  # when its first token was sampled here; 0: not yet
    last: float = 0.0
    tokens: int = 0


class RequestSpans:
    """Follows the records of one session that somebody traces. Times are of the monotonic clock."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._records: dict[int, _Traced] = {}
        self._slots: dict[int, _Traced] = {}
        self._outputs: dict[int, list[tuple[int, _Traced]]] = {}  # step -> (place among its outputs, who)

    def planned(self, plan: Plan, now: float) -> None:
        """A plan has come."""
        for admit in plan.admits:
            if admit.trace:
                self._records[admit.record] = _Traced(admit.trace, now)
        if not self._records:
            return
        for record in unpack(plan.drops).tolist():
            self._end(self._records.pop(record, None))
        for slot in unpack(plan.frees).tolist():
            self._slots.pop(slot, None)
        for slot, record in zip(unpack(plan.bind_slots).tolist(), unpack(plan.bind_records).tolist(), strict=True):
            self._slots.pop(slot, None)
            if record in self._records:
                self._slots[slot] = self._records[record]
        sampling = [slot for slot, outputs in zip(unpack(plan.slots).tolist(), unpack(plan.outputs).tolist(), strict=True) if outputs]
        sampling += unpack(plan.fork_slots).tolist()
        self._outputs[plan.step] = [(place, self._slots[slot]) for place, slot in enumerate(sampling) if slot in self._slots]

    def answered(self, result: Result, now: float) -> None:
        """A result is sent."""
        counts = unpack(result.counts)
        for place, traced in self._outputs.pop(result.step, ()):
            if counts[place]:
                traced.first = traced.first or now
                traced.last = now
                traced.tokens += 1

    def closed(self) -> None:
        """The session is over: what was traced goes on elsewhere."""
        for traced in self._records.values():
            self._end(traced)
        self._records.clear()
        self._slots.clear()
        self._outputs.clear()

    def _end(self, traced: _Traced | None) -> None:
        if traced is not None and traced.first:
            self._tracer.span("prefill", traced.traceparent, traced.begun, traced.first)
            self._tracer.span("decode", traced.traceparent, traced.first, traced.last, {"gen_ai.usage.completion_tokens": traced.tokens})
