"""How a layer scores keys. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scoring:
    """A query's score of a key is s = scale · q·k, or softcap · tanh(s / softcap); it sees the last `window` positions, its own too."""

    scale: float
    window: int = 0  # 0: all
    softcap: float = 0.0  # 0: none (Gemma 2)


def plain(layers: int, head_dim: int) -> tuple[Scoring, ...]:
    """Of every layer, all keys by 1 / √head_dim (Vaswani et al. 2017)."""
    return (Scoring(head_dim**-0.5),) * layers
