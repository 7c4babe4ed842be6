"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; a cell may hold anything but a line break."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


def code(text: str) -> str:
    """Text as code, whatever it holds; nothing for nothing."""
    return f"`` {text} ``" if "`" in text else f"`{text}`" if text else ""
