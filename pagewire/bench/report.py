"""Figures for the eye: the table of a run, and two runs beside one another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagewire.bench.figures import METRICS, percentile

RATES = ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput")
UNITS = {"request_throughput": "req/s", "request_goodput": "req/s", "output_throughput": "tok/s", "total_token_throughput": "tok/s"}


class ReportError(ValueError):
    """A file that holds no result."""


def table(found: Mapping[str, Any]) -> str:
    """One run's figures."""
    lines = [
        f"completed {found['completed']}, failed {found['failed']}, in {found['duration']:.2f} s; "
        f"{found['total_input_tokens']} tokens in, {found['total_output_tokens']} out",
        "   ".join(f"{name.replace('_', ' ')} {found[name]:.2f} {UNITS[name]}" for name in RATES if name in found),
    ]
    columns = [key.removesuffix("_ttft_ms") for key in found if key.endswith("_ttft_ms")]
    lines.append(f"{'ms':6}" + "".join(f"{column:>10}" for column in columns))
    for metric in METRICS:
        lines.append(f"{metric.upper():6}" + "".join(f"{found[f'{column}_{metric}_ms']:10.2f}" for column in columns))
    lines += [f"{count} × {error}" for error, count in list(found.get("errors", {}).items())[:5]]
    return "\n".join(lines)


def read_result(path: Path) -> dict[str, float]:
    """The figures of a result file; the median of several runs. Takes vLLM's result files too. Raises ReportError."""
    content = _read(path)
    try:
        runs = _runs(content)
        names = [name for name, value in runs[0].items() if isinstance(value, int | float) and not isinstance(value, bool)]
        if "duration" not in names:
            raise ValueError("it has no duration")
        return {name: percentile([run[name] for run in runs], 50) for name in names}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ReportError(f"{path} is no result of a bench: {error}") from error


def read_last_run(path: Path) -> dict[str, Any]:
    """The last run of a result file that `read_result` takes."""
    return _runs(_read(path))[-1]


def differences(a: Path, b: Path) -> list[str]:
    """A line for each setting that two results, which `read_result` takes, were not measured alike with."""
    ours, theirs = (_read(path).get("settings") for path in (a, b))
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return []  # vLLM's file
    names = [name for name in {**ours, **theirs} if name not in ("url", "model") and ours.get(name) != theirs.get(name)]
    return [f"not alike: {name} {json.dumps(ours.get(name))} and {json.dumps(theirs.get(name))}" for name in names]


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path} is no result of a bench: {error}") from error
    return content


def _runs(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a result; vLLM's file is one."""
    runs: list[dict[str, Any]] = content.get("runs", [content])
    return runs


def comparison(a: Mapping[str, float], b: Mapping[str, float], names: tuple[str, str]) -> str:
    """Both runs, and how much b differs from a. A star marks where b is better by more than 1%."""
    rows = [("", *names, "change")]
    for name in [name for name in a if name in b]:
        if name not in RATES and not name.endswith("_ms") and name not in ("completed", "failed", "duration"):
            continue
        change = (b[name] - a[name]) / a[name] if a[name] else 0.0
        better = change > 0.01 if name in RATES or name == "completed" else change < -0.01
        rows.append((name, f"{a[name]:.2f}", f"{b[name]:.2f}", f"{change:+.1%}{' *' if better else '  '}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)) for row in rows
    )
