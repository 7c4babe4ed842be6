"""How many plans are kept in flight at a worker, so that its device never waits for one.

A step that begins when its predecessor ends needs its plan there by then: planned at least one round trip earlier, on
the wire and through both processes. So depth 1 + ceil(round trip / step time) keeps the device busy. The round trip is
measured where nothing else mixes in: at a plan sent with none in flight, from the sending to the result, less the
step's own time. While steps follow each other there is no such plan, so one is made now and then, by holding the next
back until the pipeline is empty; that costs one round trip.

A device that waits all the same has processes around it that are late at times: a few plans more cover for that. If it
waits no less with all of them, it is tried without: how late processes are changes from second to second, so only shares
of neighbouring seconds compare. Where the slack is missed it is back at once; otherwise plans would but lie elsewhere.
"""

from __future__ import annotations

from collections import deque
from math import ceil, inf

LEAST, MOST = 2, 16  # plans
SLACK = 4  # plans beyond the calculation
RECENT = 4  # measurements of which the least counts: compiling or a late process only ever add to one
EVERY = 10.0  # seconds between two measurements while the depth is more than the least
WINDOW = 0.5  # seconds of the device over which its waiting is summed; while it waits, one is measured after each, at first
EASE = 60.0  # seconds until something that seemed useless, or useful, is tried again
WAITING = 0.01  # share of time without work from which a device waits
PATIENT = 128  # windows between two measurements, at last
TRIED = 4  # windows of patience from which all the slack has had its chance
HELPS = 0.8  # of the waiting without slack that may be left with it for the slack to be worth it


class Depth:
    """The depth of one worker's pipeline; `plans` is how many may be in flight now, `wanted` how many as a rule."""

    def __init__(self, fixed: int) -> None:
        """`fixed`: plans; 0: by measurement."""
        self.plans = self.wanted = fixed or LEAST
        self._adaptive = not fixed
        self._round_trips: deque[float] = deque(maxlen=RECENT)
        self._seconds = self._idle = 0.0  # of the steps of the present window, and the time without work before them
        self._idle_share = 0.0  # of the last whole window, from 0 to 1
        self._slack = 0
        self._without = 0.0  # the share before there was any slack
        self._with = inf  # the least share with all of it: late processes only ever add to one
        self._trial = False  # whether it has been taken away to see what it is worth
        self._trial_at = 0.0  # when it may be
        self._eased_at = 0.0
        self._measured_at = 0.0
        self._windows = 0  # whole ones since the last measurement that was asked for
        self._patience = 1  # windows until the next, while the device waits

    def measured(self, round_trip: float, step: float, now: float) -> bool:
        """A plan sent alone has come back. Whether the depth has changed. Times in seconds."""
        if not self._adaptive:
            return False
        self._round_trips.append(max(round_trip, 0.0))
        before, slack, asked = self.wanted, self._slack, self.plans < self.wanted
        if step > 0:
            if asked:
                self._adjust_slack(now)
            self.wanted = min(max(1 + ceil(min(self._round_trips) / step), LEAST) + self._slack, MOST)
        self.plans = self.wanted
        if asked:
            self._measured_at = now
            self._seconds = self._idle = 0.0
            self._windows = 0
            # a device that waits for something else than plans is not asked again and again
            self._patience = 1 if self.wanted > before or self._slack != slack else min(2 * self._patience, PATIENT)
        return self.wanted != before

    def took(self, seconds: float, idle: float, now: float) -> None:
        """A step among others has taken so long, after so much time without work."""
        if not self._adaptive or not seconds:
            return
        self._seconds += seconds
        self._idle += idle
        if self._seconds + self._idle < WINDOW:
            return
        # Whole windows: looked at as soon as it passes a bound, a share is always that bound, and slack never seems to help.
        self._idle_share = self._idle / (self._seconds + self._idle)
        self._seconds = self._idle = 0.0
        waits = self._idle_share >= WAITING
        self._windows += 1
        if self._windows >= self._patience if waits else now - self._measured_at > EVERY and self.wanted > LEAST:
            self.plans = 1  # the next plan goes out alone

    def _adjust_slack(self, now: float) -> None:
        share, waits = self._idle_share, self._idle_share >= WAITING
        if self._trial:
            if self._with <= HELPS * share:
                self._slack, self._trial, self._trial_at = SLACK, False, now + EASE  # it is missed
            elif self._patience == PATIENT:
                self._trial = False  # from the beginning: the device may wait for plans by now
        elif waits and self._slack < SLACK:
            if not self._slack:
                self._without = share
            self._slack += 1
            self._with = inf
        elif waits:
            self._with = min(self._with, share)
            if self._with > HELPS * self._without and self._patience >= TRIED and now >= self._trial_at:
                self._slack, self._trial = 0, True
        elif self._slack and now - self._eased_at > EASE:
            self._slack -= 1
            self._eased_at = now
        if waits:
            self._eased_at = now
