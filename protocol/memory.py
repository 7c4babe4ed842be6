"""Memory of the process itself, as the system counts it."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3


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


def map_large(at_least: int = 64 << 10) -> None:
    """Let memory of so many bytes and more go back to the system as soon as it is freed: glibc then takes each from the system on its
    own, keeps less than that at its heap's end, where it would take large ones from first, and raises no bound by itself.

    Otherwise a queue of large frames leaves holes that what lives between them keeps: 2,000 frames of 100 to 700 kB,
    faster than they were read, left a scheduler 53 MiB; now 0.5, after a peak of 281. It costs large, short-lived memory its page
    faults, so it is for a process that computes nothing. Does nothing under another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for bound, value in ((M_MMAP_THRESHOLD, at_least), (M_TRIM_THRESHOLD, at_least), (M_TOP_PAD, at_least // 2)):
        mallopt(ctypes.c_int(bound), ctypes.c_int(value))
