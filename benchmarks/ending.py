"""A benchmark that is told to end ends what it has started, as it does at Ctrl-C."""

from __future__ import annotations

import atexit
import contextlib
import signal
from types import FrameType

import psutil

PATIENCE = 8.0  # seconds that services get to end themselves


def end_in_order() -> None:
    """Have SIGTERM and SIGHUP leave the main thread by SystemExit, so that every `finally` on the way is run.

    The signal may come while a program is being started, before anybody knows it: what is left at the very end is ended too.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGTERM, signal.SIGHUP):  # told once is enough
        signal.signal(other, signal.SIG_IGN)
    atexit.register(_end_the_rest)
    raise SystemExit(128 + number)


def _end_the_rest() -> None:
    left = psutil.Process().children(recursive=True)
    for end, patience in ((psutil.Process.terminate, PATIENCE), (psutil.Process.kill, 1.0)):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, left = psutil.wait_procs(left, patience)
