"""Who waits, in which order: by priority, fairly between tenants, and by age within a tenant."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from itertools import chain

from scheduler_svc.requests import Choice, Key, State

LineName = tuple[int, str, int]  # priority, tenant, index of the frontend


class Shares:
    """Tokens that each tenant has been given, so that the one with the least comes next.

    This is deficit round robin over tokens (Shreedhar and Varghese 1995) in its sorted form: a tenant's turn costs it
    what it took. One that comes back after a pause starts beside those who waited, so that it has saved nothing up.
    """

    def __init__(self) -> None:
        self._given: dict[str, int] = {}
        self._waiting: dict[str, int] = {}  # choices per tenant

    def arrive(self, tenant: str) -> None:
        """A choice of the tenant waits from now on."""
        if not self._waiting.get(tenant):
            floor = min((self._given[other] for other in self._waiting), default=0)
            self._given[tenant] = max(self._given.get(tenant, 0), floor)
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """A choice of the tenant waits no longer."""
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            if not self._waiting:
                self._given = {}

    def charge(self, tenant: str, tokens: int) -> None:
        """The tenant has been given a turn."""
        self._given[tenant] = self._given.get(tenant, 0) + tokens

    def given(self, tenant: str) -> int:
        """Tokens so far, comparable between tenants that wait."""
        return self._given.get(tenant, 0)


class Line:
    """Choices of one priority, tenant and frontend in the order of their keys."""

    __slots__ = ("choices", "keys")

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self.choices: list[Choice] = []


class Queue:
    """Waiting choices. A line per frontend, so that one without credit is passed over whole."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._lines: dict[LineName, Line] = {}
        self._count = 0
        self.tokens = 0  # of all that wait

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Choice]:
        return chain.from_iterable(line.choices for line in self._lines.values())

    def add(self, choice: Choice) -> None:
        """Let a choice wait here."""
        assert choice.queue is None
        assert choice.slot < 0
        line = self._lines.get(_line_of(choice))
        if line is None:
            line = self._lines[_line_of(choice)] = Line()
        at = bisect.bisect(line.keys, choice.key)
        line.keys.insert(at, choice.key)
        line.choices.insert(at, choice)
        self._shares.arrive(choice.request.tenant)
        self.tokens += choice.length
        self._count += 1
        choice.queue = self
        choice.state = State.WAITING

    def remove(self, choice: Choice) -> None:
        """Take a choice out; it must be here."""
        line = self._lines[_line_of(choice)]
        at = bisect.bisect_left(line.keys, choice.key)
        assert line.choices[at] is choice
        del line.keys[at], line.choices[at]
        if not line.keys:
            del self._lines[_line_of(choice)]
        self._shares.leave(choice.request.tenant)
        self.tokens -= choice.length
        self._count -= 1
        choice.queue = None

    def first(self, passed_over: Callable[[int], bool], trial: int) -> Choice | None:
        """Whose turn it is: of those with this `trial`, not of frontends (by index) that are passed over."""
        best: tuple[int, int, Key] | None = None
        chosen = None
        for (priority, tenant, frontend), line in self._lines.items():
            if passed_over(frontend):
                continue
            choice = next((choice for choice in line.choices if choice.request.trial == trial), None)
            if choice is None:
                continue
            # what has run before has been paid for
            rank = (priority, -1 if choice.was_running else self._shares.given(tenant), choice.key)
            if best is None or rank < best:
                best, chosen = rank, choice
        return chosen

    def charge(self, choice: Choice, tokens: int) -> None:
        """The choice gets its turn, which is expected to take so many tokens."""
        if not choice.was_running:
            choice.was_running = True
            self._shares.charge(choice.request.tenant, tokens)


def _line_of(choice: Choice) -> LineName:
    request = choice.request
    return request.priority, request.tenant, request.frontend.index
