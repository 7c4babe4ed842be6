"""Stop strings, found while text arrives in pieces of any size (Aho and Corasick, 1975).

The first character at which any stop string is complete ends the text; of several that end there the longest counts. So
the result depends on the text alone, never on how tokens cut it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """The tables of some stop strings. They never change, so all choices of a body share them."""

    __slots__ = ("depth", "fail", "first", "found", "next")

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self.next: list[dict[str, int]] = [{}]  # per state: character → state
        self.depth = [0]  # per state: how much of a stop string it has seen
        self.found: list[str | None] = [None]  # per state: the longest stop string that ends here
        for stop in stops:
            self._add(stop)
        self.fail = self._link()
        self.first = re.compile("[" + "".join(re.escape(stop[0]) for stop in stops) + "]")

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self.next[state]:
                self.next[state][character] = len(self.next)
                self.next.append({})
                self.depth.append(self.depth[state] + 1)
                self.found.append(None)
            state = self.next[state][character]
        self.found[state] = stop

    def _link(self) -> list[int]:
        """Per state: the state of its longest proper end that begins a stop string."""
        fail = [0] * len(self.next)
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self.next[state].items():
                back = fail[state]
                while back and character not in self.next[back]:
                    back = fail[back]
                fail[child] = self.next[back].get(character, 0)
                if self.found[child] is None:
                    self.found[child] = self.found[fail[child]]
                queue.append(child)
        return fail


class StopMatcher:
    """Passes text on, keeping back exactly the longest end of it with which a stop string may begin.

    stop: the stop string found, or None. `start` text is released up to it, its own text is dropped.
    """

    __slots__ = ("_automaton", "_held", "_state", "stop")

    def __init__(self, stops: StopAutomaton | Sequence[str]) -> None:
        """Raises ValueError for an empty stop string."""
        self._automaton = stops if isinstance(stops, StopAutomaton) else StopAutomaton(stops)
        self.stop: str | None = None
        self._state = 0
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may be shown now that `text` has arrived."""
        if self.stop is not None:
            return ""
        tables, state = self._automaton, self._state
        if state == 0 and tables.first.search(text) is None:
            return text
        whole = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            while state and character not in tables.next[state]:
                state = tables.fail[state]
            state = tables.next[state].get(character, 0)
            if (stop := tables.found[state]) is not None:
                self.stop, self._held = stop, ""
                return whole[: end - len(stop)]
        self._state = state
        shown = len(whole) - tables.depth[state]
        self._held = whole[shown:]
        return whole[:shown]

    def flush(self) -> str:
        """What was kept back, once no more text will come."""
        held, self._held, self._state = self._held, "", 0
        return held
