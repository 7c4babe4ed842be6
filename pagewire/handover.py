"""What an admin server that is replaced leaves to the next one: the monitor's sums, so that they go on.

They stand in `monitor.json` of the run directory for a moment, and count only for a successor that the same process
has started.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from pagewire.monitor import Sums
from protocol.registration import process_start


class _Left(msgspec.Struct):
    starter: tuple[int, int]  # of the admin server: pid, and when it started
    sums: Sums


def leave(path: Path, sums: Sums) -> None:
    """Leave the sums to the next admin server, if the disk has room for them."""
    made = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        made.write_bytes(msgspec.json.encode(_Left(_starter(), sums)))
        made.replace(path)


def take_up(path: Path) -> Sums | None:
    """The sums that a predecessor has left, once; None if there are none, or another deployment's."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        left = msgspec.json.decode(path.read_bytes(), type=_Left)
        path.unlink()
        if left.starter == _starter():
            return left.sums
    return None


def _starter() -> tuple[int, int]:
    return os.getppid(), process_start(os.getppid())
