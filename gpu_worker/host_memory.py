"""Memory of the process itself, as the system counts it."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Return freed memory to the system: glibc keeps what loading a model has freed, 10 to 135 MiB for SmolLM2.

    Does nothing under another C library.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(ctypes.c_size_t(0))
