"""Draws the profile rows of a results file (`gpu_profile.py`) as an SVG: where the time of a step goes, a bar per batch.

python -m benchmarks.gpu_profile_svg benchmarks/results/h100-qwen3-0.6b.json --output docs/gpu-step.svg
"""

from __future__ import annotations

import argparse
import json
import re
from html import escape
from pathlib import Path

WIDTH, LEFT, RIGHT, ROW, BAR, TOP, BOTTOM = 900, 210, 90, 40, 24, 44, 12  # pixels
LEGEND = 122  # pixels of an entry
LEAST = 46  # pixels from which a part's time is written on it
PARTS = ("attention", "linears", "head", "norms", "sampler", "prepare")
STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1b1f24 } .dim { fill: #59626d } .back { fill: #fff } .on { fill: #fff; font-size: 11px }
  .attention { fill: #2f77d0 } .linears { fill: #187a36 } .head { fill: #b97a00 } .norms { fill: #8b3fc7 } .sampler { fill: #c4212b }
  .prepare { fill: #59626d }
  @media (prefers-color-scheme: dark) { text { fill: #e4e8ed } .dim { fill: #98a3b0 } .back { fill: #181e25 } .on { fill: #fff } }
"""


def title_of(row: str) -> str:
    """ "decode, batch 32, context 800" of "profile_decode_32x800_us". Raises ValueError for another row."""
    match = re.fullmatch(r"profile_(decode|prefill)_(\d+)x(\d+)_us", row)
    if match is None:
        raise ValueError(f"{row} is no profile")
    kind, batch, length = match.groups()
    return f"decode, batch {batch}, context {length}" if kind == "decode" else f"prefill, {batch} × {length} tokens"


def draw(shape: str, card: str, rows: dict[str, dict[str, float]]) -> str:
    """The SVG; rows: microseconds a step of each part."""
    height, span = TOP + ROW * len(rows) + BOTTOM, WIDTH - LEFT - RIGHT
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"><style>{STYLE}</style>']
    out.append(f"<title>Where the time of a step goes: {escape(shape)} on {escape(card)}</title>")
    out.append(f'<rect class="back" width="{WIDTH}" height="{height}" rx="8"/>')
    for i, part in enumerate(PARTS):
        x = 14 + i * LEGEND
        out.append(f'<rect class="{part}" x="{x}" y="14" width="12" height="12" rx="2"/><text x="{x + 18}" y="24">{part}</text>')
    for i, (row, times) in enumerate(rows.items()):
        y, x, total = TOP + ROW * i, float(LEFT), sum(times.values())
        out.append(f'<text x="14" y="{y + BAR - 8}">{title_of(row)}</text>')
        for part in PARTS:
            width = span * times[part] / total
            out.append(f'<rect class="{part}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}"/>')
            if width >= LEAST:
                out.append(f'<text class="on" x="{x + width / 2:.1f}" y="{y + BAR - 8}" text-anchor="middle">{times[part]:,.0f} µs</text>')
            x += width
        out.append(f'<text class="dim" x="{LEFT + span + 8}" y="{y + BAR - 8}">{total / 1e3:.2f} ms</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    record = json.loads(args.results.read_text())
    rows = {name: times for name, times in record["rows"].items() if name.startswith("profile_")}
    if not rows:
        raise SystemExit(f"{args.results} has no profile rows: run gpu_profile.py with --json first")
    args.output.write_text(draw(record["shape"], record["card"], rows))


if __name__ == "__main__":
    main()
