"""Draws a part of a trace (`pagewire trace`) as an SVG: who does what, and for which step.

    pagewire trace --seconds 5 --output trace.json
    python benchmarks/timeline_svg.py trace.json --output docs/timeline.svg

Without --begin the part starts a step before the first prompt that arrives, so that one sees a request come in.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, ROW, BAR, TOP, BOTTOM = 1100, 150, 26, 16, 34, 30  # pixels
LEAST = 2.0  # pixels of a bar
LANES = (  # role, names in it, what it is called
    ("frontend", ("tokenize",), "frontend: tokenize"),
    ("frontend", ("detokenize",), "frontend: detokenize"),
    ("scheduler", ("queue",), "scheduler: queue"),
    ("scheduler", ("plan", "send"), "scheduler: plan, send"),
    ("scheduler", ("result",), "scheduler: result"),
    ("worker", ("forward",), "worker: forward"),
    ("worker", ("sample",), "worker: sample"),
)
STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1b1f24 } .dim { fill: #59626d } .grid { stroke: #d9dde3 } .back { fill: #fff }
  .tokenize, .detokenize { fill: #8b3fc7 } .queue { fill: #b9c2cd } .plan, .send { fill: #187a36 } .result { fill: #b97a00 }
  .forward { fill: #2f77d0 } .forward.odd { fill: #6aa3e6 } .sample { fill: #c4212b } .link { fill: none; stroke: #187a36; opacity: .55 }
  .on { fill: #fff; font-size: 11px }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e8ed } .dim { fill: #98a3b0 } .grid { stroke: #2b343f } .back { fill: #181e25 } .queue { fill: #4a5563 }
    .plan, .send { fill: #5bc77b } .link { stroke: #5bc77b } .result { fill: #e3ac4a } .sample { fill: #ff7b7f } .on { fill: #fff }
  }
"""


def bars(trace: dict[str, Any]) -> Iterator[tuple[str, str, float, float, int]]:
    """(role, name, begin, end, step or −1) of every span; microseconds."""
    opened: dict[str, float] = {}
    for event in trace["traceEvents"]:
        step = event.get("args", {}).get("step", -1)
        match event["ph"]:
            case "X":
                yield event["cat"], event["name"], event["ts"], event["ts"] + event["dur"], step
            case "b":
                opened[event["id"]] = event["ts"]
            case "e":
                yield event["cat"], event["name"], opened.pop(event["id"]), event["ts"], step


def part(spans: list[tuple[str, str, float, float, int]], steps: int) -> tuple[float, float]:
    """Begin and end of a part with so many steps around the first prompt that came while steps ran."""
    forwards = sorted((begin, end) for _, name, begin, end, _ in spans if name == "forward")
    if len(forwards) < steps + 2:
        raise SystemExit(f"the trace holds {len(forwards)} steps; {steps + 2} are needed")
    prompts = sorted(begin for _, name, begin, _, _ in spans if name == "tokenize" and begin > forwards[1][0])
    first = next((i for i, (_, end) in enumerate(forwards) if prompts and end > prompts[0]), 1)
    first = min(max(1, first - 1), len(forwards) - steps)
    return forwards[first][0] - 0.1 * (forwards[first][1] - forwards[first][0]), forwards[first + steps - 1][1]


def draw(trace: dict[str, Any], begin: float, end: float) -> str:
    """The SVG of that part."""
    spans = list(bars(trace))
    height = TOP + ROW * len(LANES) + BOTTOM
    scale = (WIDTH - LEFT - 34) / (end - begin)

    def x(at: float) -> float:
        return LEFT + (min(max(at, begin), end) - begin) * scale

    def y(lane: int) -> float:
        return TOP + ROW * lane

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"><style>{STYLE}</style>']
    out.append("<title>Plans are made while the steps before them run</title>")
    out.append(f'<rect class="back" width="{WIDTH}" height="{height}" rx="8"/>')
    tick = next(size for size in (1e2, 2e2, 5e2, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6) if (end - begin) / size <= 12)
    for i in range(int((end - begin) / tick) + 1):
        at = x(begin + i * tick)
        out.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 6}" y2="{height - BOTTOM}"/>')
        out.append(f'<text class="dim" x="{at:.1f}" y="{TOP - 12}" text-anchor="middle">{i * tick / 1e3:g} ms</text>')
    planned: dict[int, float] = {}
    links, boxes = [], []
    for lane, (role, names, title) in enumerate(LANES):
        out.append(f'<text x="10" y="{y(lane) + BAR - 3}">{escape(title)}</text>')
        for _, name, first, last, step in sorted(s for s in spans if s[0] == role and s[1] in names):
            if name == "plan":
                planned[step] = first
            if last < begin or first > end:
                continue
            left, width = x(first), max(LEAST, x(last) - x(first))
            odd = " odd" if step % 2 else ""
            boxes.append(f'<rect class="{name}{odd}" x="{left:.1f}" y="{y(lane)}" width="{width:.1f}" height="{BAR}" rx="1.5"/>')
            if name == "plan" and first >= begin:
                boxes.append(f'<text class="dim" x="{left + width + 3:.1f}" y="{y(lane) + BAR - 4}" font-size="10">{step}</text>')
            if name == "forward" and width > 22:
                boxes.append(f'<text class="on" x="{left + width / 2:.1f}" y="{y(lane) + BAR - 4}" text-anchor="middle">{step}</text>')
                if step in planned and planned[step] >= begin and first >= begin:
                    start, low = x(planned[step]), y(3) + BAR
                    aim = left + 2
                    curve = f"M{start:.1f},{low} C{start:.1f},{low + 24} {aim:.1f},{low + 8} {aim:.1f},{y(lane)}"
                    links.append(f'<path class="link" d="{curve}"/>')
    about = trace["otherData"]
    shares = ", ".join(f"{name}'s device is busy {share:.1%} of {about['seconds']:.1f} s" for name, share in about["busy_share"].items())
    out += [*links, *boxes, f'<text class="dim" x="10" y="{height - 10}">Numbers are steps; {escape(shares)}.</text>', "</svg>"]
    return "\n".join(out) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8, help="how many steps to show (default: %(default)s)")
    parser.add_argument("--begin", type=float, help="where to begin, in milliseconds")
    options = parser.parse_args()
    trace = json.loads(options.trace.read_text())
    begin, end = part(list(bars(trace)), options.steps)
    if options.begin is not None:
        begin, end = options.begin * 1e3, options.begin * 1e3 + end - begin
    options.output.write_text(draw(trace, begin, end))


if __name__ == "__main__":
    main()
