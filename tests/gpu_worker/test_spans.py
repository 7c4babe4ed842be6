"""A worker's spans of traced requests, from plans and results alone."""

from __future__ import annotations

from typing import Any

from gpu_worker.spans import RequestSpans
from protocol.columns import pack
from protocol.messages import Admit, Plan, Result, SamplingParams

PARAMS = SamplingParams(8)


class Noted:
    """A tracer that keeps (name, traceparent, begin, end, tokens)."""

    def __init__(self) -> None:
        self.spans: list[tuple[Any, ...]] = []

    def span(self, name: str, parent: str, begin: float, end: float, attributes: dict[str, Any] | None = None) -> None:
        self.spans.append((name, parent, begin, end, (attributes or {}).get("gen_ai.usage.completion_tokens")))


def plan(step: int, rows: list[tuple[int, int]], admit: tuple[int, int, str] | None = None, **more: Any) -> Plan:
    """Rows are (slot, outputs); `admit` is (record, slot, traceparent)."""
    if admit is not None:
        record, slot, trace = admit
        more |= {"admits": [Admit(record, pack([1, 2]), b"", 0, PARAMS, trace)], "bind_slots": pack([slot]), "bind_records": pack([record])}
    return Plan(step, slots=pack([slot for slot, _ in rows]), outputs=pack([outputs for _, outputs in rows]), **more)


def result(step: int, counts: list[int]) -> Result:
    return Result(step, counts=pack(counts), ids=pack([7] * sum(counts)), flags=bytes(len(counts)))


def spans() -> tuple[RequestSpans, Noted]:
    noted = Noted()
    return RequestSpans(noted), noted  # type: ignore[arg-type]


def test_prefill_ends_with_the_first_token_and_decode_with_the_last() -> None:
    followed, noted = spans()
    followed.planned(plan(1, [(3, 0)], (9, 3, "t")), 1.0)  # a chunk that does not end the prefill
    followed.answered(result(1, []), 1.5)
    followed.planned(plan(2, [(5, 1), (3, 1)]), 1.6)  # beside a sequence that nobody traces
    followed.planned(plan(3, [(5, 1), (3, 1)]), 1.7)
    followed.answered(result(2, [1, 1]), 2.0)
    followed.answered(result(3, [1, 1]), 3.0)
    followed.planned(plan(4, [(5, 1), (3, 1)]), 3.5)
    followed.answered(result(4, [1, 0]), 4.0)  # it had ended
    assert noted.spans == []
    followed.planned(plan(5, [], drops=pack([9]), frees=pack([3])), 5.0)
    assert noted.spans == [("prefill", "t", 1.0, 2.0, None), ("decode", "t", 2.0, 3.0, 2)]


def test_a_slot_s_next_owner_is_not_taken_for_the_one_before() -> None:
    followed, noted = spans()
    followed.planned(plan(1, [(3, 1)], (9, 3, "t")), 1.0)
    followed.answered(result(1, [1]), 2.0)
    followed.planned(plan(2, [(3, 1)], (10, 3, "")), 3.0)  # preempted: its record stays, its slot is another's
    followed.answered(result(2, [1]), 4.0)
    followed.closed()
    assert noted.spans == [("prefill", "t", 1.0, 2.0, None), ("decode", "t", 2.0, 2.0, 1)]


def test_forks_have_their_first_token_from_their_parent_s_row() -> None:
    followed, noted = spans()
    admits = [Admit(9, pack([1]), b"", 0, PARAMS, "t"), Admit(10, pack([1]), b"", 1, PARAMS, "t")]
    binds = {"bind_slots": pack([3, 4]), "bind_records": pack([9, 10])}
    followed.planned(plan(1, [(3, 1)], admits=admits, fork_rows=pack([0]), fork_slots=pack([4]), **binds), 1.0)
    followed.answered(result(1, [1, 1]), 2.0)
    followed.closed()
    assert [name for name, *_ in noted.spans] == ["prefill", "decode"] * 2


def test_what_nobody_traces_leaves_nothing_behind() -> None:
    followed, noted = spans()
    for step in range(1, 100):
        followed.planned(plan(step, [(3, 1)], (step, 3, "")), 1.0)
    followed.closed()
    assert noted.spans == []
    assert not followed._outputs
