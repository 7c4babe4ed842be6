"""The files `benchmarks/results/<card>-<shape>.json`: one per card and shape, to which every GPU benchmark adds its rows."""

from __future__ import annotations

import importlib.metadata
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "triton", "flash-attn")


def card() -> str:
    """The card's name as the driver gives it; "cpu" without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """Versions of what a figure depends on, as far as it is installed."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def file_of(out: Path, shape: str) -> Path:
    """The file that `--json OUT` means: OUT itself or, of a folder, the one named after card and shape."""
    if out.suffix == ".json":
        return out
    short = re.search(r"[A-Z]+\d+\w*", card())  # "H100" of "NVIDIA H100 80GB HBM3"
    return out / f"{short[0].lower() if short else card()}-{shape}.json"


def add_rows(out: Path, shape: str, rows: Mapping[str, Any], script: str, note: str) -> Path:
    """Add a script's rows to the file, in the place of older ones of the same names, and how they were measured; returns its path."""
    path = file_of(out, shape)
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    record |= {"card": card(), "date": time.strftime("%Y-%m-%d"), "versions": versions(), "shape": shape}
    record["notes"] = record.get("notes", {}) | {script: note}
    record["rows"] = record.get("rows", {}) | dict(rows)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
