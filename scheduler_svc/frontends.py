"""Frontends and their credit.

One Frontend object per session. When a session ends, its requests stay with the mute object until the same
incarnation opens a new session and names them, another frontend takes them over, or the grace ends.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.columns import pack, pack_floats
from protocol.messages import Tokens
from scheduler_svc.requests import Request

Logprobs = tuple[bytes, bytes, bytes, bytes]  # the columns lp_counts, lp_ids, lp_values and lp_ranks of TOKENS

NO_LOGPROBS: Logprobs = (b"", b"", b"", b"")


class Frontend:
    """One session of a frontend."""

    def __init__(self, index: int, session: int, name: str, incarnation: int) -> None:
        self.index = index  # stands in the workers' columns
        self.session = session  # 0: mute, the session has ended
        self.name = name
        self.incarnation = incarnation
        self.requests: dict[bytes, Request] = {}
        self.in_flight = 0  # sampling rows in plans not yet acknowledged
        self.unsent = 0  # tokens known but not sent
        self.resumed = False
        self.named = 0  # requests named before RESUMED
        self.admitted: list[tuple[int, int, float]] = []  # (handle, cached tokens, seconds waited) to be told with the next tokens

    def tokens(
        self,
        handles: bytes = b"",
        choices: bytes = b"",
        firsts: bytes = b"",
        counts: bytes = b"",
        ids: bytes = b"",
        logprobs: Logprobs = NO_LOGPROBS,
    ) -> Tokens:
        """A message of packed columns, with the news of who has been admitted."""
        if not self.admitted:
            return Tokens(handles, choices, firsts, counts, ids, *logprobs)
        admitted, cached, queued = zip(*self.admitted, strict=True)
        self.admitted = []
        return Tokens(handles, choices, firsts, counts, ids, *logprobs, pack(admitted), pack(cached), pack_floats(queued))


class Frontends:
    """All of them, by session and by index."""

    def __init__(self, unacked: Callable[[int], int]) -> None:
        self.limit = 0  # credit of each, in tokens
        self.by_session: dict[int, Frontend] = {}
        self.by_index: list[Frontend | None] = []
        self._unacked = unacked
        self.queued: dict[int, int] = {}  # tokens on their way to a session's link, by session

    def open(self, session: int, name: str, incarnation: int) -> Frontend:
        """A new session."""
        if None not in self.by_index:
            self.by_index.append(None)
        index = self.by_index.index(None)
        frontend = Frontend(index, session, name, incarnation)
        self.by_index[index] = frontend
        self.by_session[session] = frontend
        return frontend

    def close(self, session: int) -> Frontend | None:
        """The session is over; the object stays while it has requests or rows in flight."""
        frontend = self.by_session.pop(session, None)
        if frontend is not None:
            frontend.session = 0
            frontend.admitted.clear()
        return frontend

    def at(self, index: int) -> Frontend:
        """The frontend that a column's value names."""
        frontend = self.by_index[index]
        assert frontend is not None, "a column names a frontend that is gone"
        return frontend

    def mute(self, incarnation: int) -> list[Frontend]:
        """Ended sessions of one incarnation that still have requests."""
        return [f for f in self.by_index if f is not None and not f.session and f.incarnation == incarnation]

    def sweep(self) -> None:
        """Forget ended sessions that nothing refers to."""
        for index, f in enumerate(self.by_index):
            if f is not None and not f.session and not f.requests and not f.in_flight:
                self.by_index[index] = None

    def free(self, frontend: Frontend) -> int:
        """Tokens that may still be sampled for it; negative while it owes. Derived, so it cannot drift."""
        sent = self._unacked(frontend.session) + self.queued.get(frontend.session, 0) if frontend.session else 0
        return self.limit - frontend.in_flight - sent - frontend.unsent


class Allowance:
    """Tokens that may still be sampled for each frontend, by index, as one plan uses them up."""

    __slots__ = ("_free", "_frontends")

    def __init__(self, frontends: Frontends) -> None:
        self._frontends = frontends
        self._free: dict[int, int] = {}

    def free(self, index: int) -> int:
        """What is left; negative while the frontend owes."""
        if index not in self._free:
            self._free[index] = self._frontends.free(self._frontends.at(index))
        return self._free[index]

    def use(self, index: int, tokens: int) -> None:
        """So many are sampled in this plan."""
        self._free[index] = self.free(index) - tokens

    @property
    def used_up(self) -> bool:
        """Whether one of the frontends asked about has nothing left."""
        return any(free <= 0 for free in self._free.values())
