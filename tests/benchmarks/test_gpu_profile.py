"""A step's time by parts, and its picture."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.gpu_profile_svg import PARTS, draw, title_of


def test_parts_are_told_by_kernels_and_the_head_by_its_place() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu_profile import parts

    step = [
        ("prepare", 2),
        ("embed", 1),
        ("linear", 10),
        ("decode_few", 5),
        ("nvjet_tst", 7),
        ("rms_norm", 1),
        ("linear", 20),
        ("sample", 3),
    ]
    at, spans = 0.0, []
    for name, took in step * 2:
        spans.append((at, at + took, name))
        at += took
    assert parts(spans, 2) == {"attention": 5, "linears": 17, "head": 20, "norms": 1, "sampler": 3, "prepare": 3}
    assert sum(parts([(0.0, 5.0, "linear"), (3.0, 9.0, "rms_norm"), (4.0, 8.0, "sample")], 1).values()) == 9  # overlap is counted once


def test_bars_fill_the_width_in_proportion() -> None:
    times = dict(zip(PARTS, (50.0, 25.0, 10.0, 5.0, 5.0, 5.0), strict=True))
    svg = draw("small", "a card", {"profile_decode_8x256_us": times, "profile_prefill_4x2048_us": dict.fromkeys(PARTS, 1000.0)})
    boxes = [box for box in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect") if box.get("height") == "24"]
    widths = [float(box.get("width", 0)) for box in boxes]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
    assert sum(widths[:6]) == pytest.approx(sum(widths[6:]), abs=1)
    assert "decode, batch 8, context 256" in svg
    assert "6.00 ms" in svg
    with pytest.raises(ValueError, match="no profile"):
        title_of("step_b1_ms")
