"""Every time constant of the system, in seconds. Tests scale them all by one factor."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Durations in seconds; DESIGN's names. Derived ones are methods, so that scaling cannot miss them."""

    resend: float = 0.05  # floor of max(resend, 4 x round trip)
    ack: float = 0.02  # a lone acknowledgement goes out after this with nothing to ride on
    window: float = 2.0  # a full or unmoved window ends the session
    silence: float = 1.0  # nothing heard: the session is over
    progress: float = 2.0  # floor of max(progress, 20 x predicted step)
    standby: float = 3.0
    resync: float = 1.0
    move: float = 10.0
    grace: float = 30.0  # a dead frontend's requests run on this long
    hold: float = 120.0  # requests wait this long without any worker
    drain: float = 300.0
    reconnect: float = 0.2  # between two attempts of a HELLO

    def scaled(self, factor: float) -> Times:
        """The same constants, each multiplied by `factor`."""
        return Times(**{f.name: getattr(self, f.name) * factor for f in dataclasses.fields(self)})

    @property
    def heartbeat(self) -> float:
        """A scheduler sends at least this often, and is answered."""
        return self.silence / 4

    @property
    def unasked(self) -> float:
        """A peer that hears nothing sends all the same, this often: somewhat later, so that it need not while it hears."""
        return self.silence / 3
