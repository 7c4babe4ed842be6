"""A transport shim for fault tests: drops, repeats and reorders what a process sends. Off unless the environment asks.

    PAGEWIRE_CHAOS="drop=0.01,dup=0.01,reorder=8,seed=1"

`drop` and `dup` are shares of the messages; with `reorder=N` one message in eight is sent behind 1 to N later ones of
its connection. Links repair all of it: only their counters show that it happened.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import zmq

from protocol.service import CannotRun

VARIABLE = "PAGEWIRE_CHAOS"
HELD = 0.125  # share of the messages that are sent late

Frames = list[bytes]


class Chaos:
    """Decides what becomes of each message. Raises ValueError, one line, for a text not of the form above."""

    def __init__(self, text: str) -> None:
        known = {"drop": 0.0, "dup": 0.0, "reorder": 0.0, "seed": 0.0}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name not in known:
                raise ValueError(f"{VARIABLE}: {name!r} is none of {', '.join(known)}")
            try:
                known[name] = float(value)
            except ValueError:
                raise ValueError(f"{VARIABLE}: {value!r} is not a number") from None
        for name in ("drop", "dup"):
            if not 0 <= known[name] <= 1:
                raise ValueError(f"{VARIABLE}: {name} is a share from 0 to 1, not {known[name]:g}")
        if not 0 <= known["reorder"] < 1 << 16:
            raise ValueError(f"{VARIABLE}: reorder is a number of messages, not {known['reorder']:g}")
        self._drop, self._duplicate, self._window = known["drop"], known["dup"], int(known["reorder"])
        self._random = random.Random(f"{known['seed']:g}/{os.getpid()}")
        self._late: WeakKeyDictionary[zmq.Socket[bytes], dict[bytes, list[tuple[int, Frames]]]] = WeakKeyDictionary()

    def passes(self, socket: zmq.Socket[bytes], frames: Frames) -> list[Frames]:
        """What is sent in place of this message: nothing, itself, itself twice, and those that it has let past."""
        draw = self._random.random
        out = [] if draw() < self._drop else [frames]
        if draw() < self._duplicate:
            out.append(frames)
        if not self._window:
            return out
        # Late ones wait for messages of their own connection: a route that is gone must not speak for another.
        route = frames[0] if socket.type == zmq.ROUTER else b""
        waiting = self._late.setdefault(socket, {}).setdefault(route, [])
        due = [late for left, late in waiting if left <= 1]
        waiting[:] = [(left - 1, late) for left, late in waiting if left > 1]
        if out and draw() < HELD:
            waiting.append((self._random.randint(1, self._window), out.pop()))
        return out + due


def from_environment(environ: Mapping[str, str]) -> Chaos | None:
    """The shim that the environment asks for. Raises CannotRun for a text that means nothing."""
    text = environ.get(VARIABLE, "")
    try:
        return Chaos(text) if text else None
    except ValueError as error:
        raise CannotRun(str(error)) from None
