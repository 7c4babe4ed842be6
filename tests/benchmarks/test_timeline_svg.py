"""The picture of a trace is well-formed and shows each step's plan before its forward."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.timeline_svg import bars, draw, part


def trace(steps: int) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    for step in range(steps):
        args = {"key": f"1:{step}", "step": step}
        events += [
            {"name": "plan", "cat": "scheduler", "ph": "X", "ts": step * 100.0, "dur": 5.0, "args": args},
            {"name": "forward", "cat": "worker", "ph": "X", "ts": step * 100.0 + 100, "dur": 99.0, "args": args},
        ]
    events += [
        {"name": "tokenize", "cat": "frontend", "ph": "b", "id": "1", "ts": 1220.0},
        {"name": "tokenize", "cat": "frontend", "ph": "e", "id": "1", "ts": 1225.0},
    ]
    return {"traceEvents": events, "otherData": {"seconds": 1.0, "busy_share": {"w<0>": 0.5}}}


def test_a_part_around_a_prompt_is_drawn_with_its_steps() -> None:
    drawn = trace(30)
    begin, end = part(list(bars(drawn)), 8)
    assert begin <= 1220 <= end
    svg = ElementTree.fromstring(draw(drawn, begin, end))
    space = "{http://www.w3.org/2000/svg}"
    labels = [text.text for text in svg.iter(f"{space}text") if text.get("class") == "on"]
    assert labels == [str(step) for step in range(int(labels[0] or 0), int(labels[0] or 0) + len(labels))]
    assert len(labels) >= 8
    assert any("w<0>" in (text.text or "") for text in svg.iter(f"{space}text"))
    assert len(list(svg.iter(f"{space}path"))) >= 6


def test_a_trace_with_too_few_steps_is_refused() -> None:
    with pytest.raises(SystemExit, match="3 steps"):
        part(list(bars(trace(3))), 8)
