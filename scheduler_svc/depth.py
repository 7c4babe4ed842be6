"""How many plans are kept in flight at a worker, so that its device never waits for one.

A step that begins when its predecessor ends needs its plan there by then: planned at least one round trip earlier, on
the wire and through both processes. So depth 1 + ceil(round trip / step time) keeps the device busy. The round trip is
measured where nothing else mixes in: at a plan sent with none in flight, from the sending to the result, less the
step's own time. While steps follow each other there is no such plan, so one is made now and then, by holding the next
back until the pipeline is empty; that costs one round trip.

A device that waits all the same has processes around it that are late at times: a few plans more cover for that, unless
all of them do not help.
"""

from __future__ import annotations

from collections import deque
from math import ceil

LEAST, MOST = 2, 16  # plans
SLACK = 4  # plans beyond the calculation
RECENT = 4  # measurements of which the least counts: compiling or a late process only ever add to one
EVERY = 10.0  # seconds between two measurements while the depth is more than the least
SOON = 0.5  # seconds between two measurements while the device waits, at first
EASE = 60.0  # seconds until something that seemed useless, or useful, is tried again
WAITING = 0.01  # share of time without work from which a device waits
HELPS = 0.8  # of the waiting that may be left for the slack to be worth it


class Depth:
    """The depth of one worker's pipeline; `plans` is how many may be in flight now, `wanted` how many as a rule."""

    def __init__(self, fixed: int) -> None:
        """`fixed`: plans; 0: by measurement."""
        self.plans = self.wanted = fixed or LEAST
        self._adaptive = not fixed
        self._round_trips: deque[float] = deque(maxlen=RECENT)
        self._idle_share = 0.0  # of the recent steps
        self._idle_before = 0.0  # the share without slack
        self._slack = 0
        self._eased_at = 0.0
        self._measured_at = 0.0
        self._patience = SOON

    def measured(self, round_trip: float, step: float, now: float) -> bool:
        """A plan sent alone has come back. Whether the depth has changed. Times in seconds."""
        if not self._adaptive:
            return False
        self._round_trips.append(max(round_trip, 0.0))
        self._measured_at = now
        before = self.wanted
        if step > 0:
            self._adjust_slack(now)
            self.wanted = min(max(1 + ceil(min(self._round_trips) / step), LEAST) + self._slack, MOST)
        self._idle_share = 0.0
        self.plans = self.wanted
        # a device that waits for something else than plans is not asked again and again
        self._patience = SOON if self.wanted > before else min(2 * self._patience, EASE)
        return self.wanted != before

    def took(self, seconds: float, idle: float, now: float) -> None:
        """A step among others has taken so long, after so much time without work."""
        if not self._adaptive or not seconds:
            return
        self._idle_share += 0.02 * (min(idle / (idle + seconds), 1.0) - self._idle_share)
        waits = self._idle_share >= WAITING
        if now - self._measured_at > (self._patience if waits else EVERY) and (waits or self.wanted > LEAST):
            self.plans = 1  # the next plan goes out alone

    def _adjust_slack(self, now: float) -> None:
        if self._idle_share >= WAITING:
            if not self._slack:
                self._idle_before = self._idle_share
            if self._slack < SLACK:
                self._slack += 1
            elif self._idle_share > HELPS * self._idle_before:
                self._slack, self._patience = 0, EASE / 2
            self._eased_at = now
        elif self._slack and now - self._eased_at > EASE:
            self._slack -= 1
            self._eased_at = now
