"""What the worker's main thread is told, in order: sessions, plans, the end."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import Plan


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """A session is open and waits for READY."""

    session: int
    hash_key: bytes


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """A session is over; plans of it that have not begun never will."""

    session: int


@dataclass(frozen=True, slots=True)
class PlanArrived:
    """The next plan of a session, checked against the geometry."""

    session: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the loop: asked to, or (`error`) because a thread has failed."""

    error: BaseException | None = None


Item = SessionOpened | SessionClosed | PlanArrived | Stop
