"""Counters of what would otherwise go unseen: refused, stale, duplicate, resent, unknown."""

from __future__ import annotations


class Counters(dict[str, int]):
    """Names to counts. Names are `part_event`, e.g. `link_resent`; `/metrics` shows every one."""

    def add(self, name: str, n: int = 1) -> None:
        """Count `n` more events."""
        self[name] = self.get(name, 0) + n
