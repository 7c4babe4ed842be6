"""Pictures of one run or of several: how the times are distributed, and how much came out when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagewire.bench.exchange import Record
from pagewire.bench.figures import METRICS, times

MISSING = "plots need matplotlib: install pagewire[bench]"


class NoPlots(RuntimeError):
    """matplotlib is not installed, or draws no pictures of that format."""


def check(path: Path) -> None:
    """Whether a picture of this name can be drawn, which is asked before the work. Raises NoPlots, one line."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise NoPlots(MISSING) from None
    if path.suffix and path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise NoPlots(f"{path}: no picture has the format {path.suffix}; name it .png, .svg or .pdf")


def plot(runs: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Write a picture (its format from the name) of runs by their labels. Raises NoPlots, or OSError.

    Four panels: the distribution functions of TTFT, TPOT, ITL and E2EL; below, output tokens per second over time.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NoPlots(MISSING) from None
    drawing = Figure(figsize=(11, 6.5), layout="constrained")
    panels = drawing.subplot_mosaic([[*METRICS], ["over time"] * len(METRICS)])
    for label, records in runs.items():
        for metric in METRICS:
            values = sorted(times(records, metric))
            panels[metric].step(values, [(i + 1) / len(values) for i in range(len(values))], where="post", label=label)
        panels["over time"].plot(*_throughput(records), label=label)
    for metric in METRICS:
        panels[metric].set(title=metric.upper(), xlabel="ms", ylim=(0, 1), xlim=(0, None))
        panels[metric].grid(alpha=0.3)
    panels["over time"].set(xlabel="s", ylabel="output tokens/s", ylim=(0, None), xlim=(0, None))
    panels["over time"].grid(alpha=0.3)
    if len(runs) > 1:
        panels["over time"].legend()
    drawing.savefig(path, dpi=110)


def records_of(run: Mapping[str, Any]) -> list[Record]:
    """The records of a run in a result file; none if they were not written, as in vLLM's."""
    return [Record(**record) for record in run.get("records", ())]


def _throughput(records: Sequence[Record], points: int = 60) -> tuple[list[float], list[float]]:
    """(middle of each interval in seconds, tokens per second), each chunk weighing its share of its request's tokens."""
    good = [r for r in records if not r.error]
    if not good:
        return [], []
    start = min(r.start for r in good)
    length = max(max(r.last for r in good) - start, 1e-9) / points
    counts = [0.0] * points
    for record in good:
        at, weight = record.first, record.tokens / record.chunks
        for gap in (0.0, *record.gaps):
            at += gap
            counts[min(points - 1, int((at - start) / length))] += weight
    return [(i + 0.5) * length for i in range(points)], [count / length for count in counts]
