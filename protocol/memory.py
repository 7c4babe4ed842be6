"""Memory of the process itself, as the system counts it."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Return freed memory to the system: glibc keeps it. Loading SmolLM2's weights left 10 to 135 MiB, a vocabulary of 152,000
    tokens 30 MB, a long text 100 bytes a character while it became tokens.

    Does nothing under another C library. A thread that calls it lets the others run.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(ctypes.c_size_t(0))
