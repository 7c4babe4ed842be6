"""What a process keeps of memory that it has freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# A thousand frames in a queue, with something small behind each that outlives it.
QUEUE = """
import psutil, sys
from protocol.memory import map_large

if sys.argv[1] == "mapped":
    map_large()
before = psutil.Process().memory_info().rss
queue, kept = [], []
for _ in range(1000):
    queue.append(b"x" * 100_000)
    kept.append(b"x" * 20_000)
peak = psutil.Process().memory_info().rss
queue.clear()
print(peak - before, psutil.Process().memory_info().rss - before)
"""


def held(mode: str) -> tuple[int, int]:
    """Bytes while the queue was full, and behind it."""
    peak, after = subprocess.check_output([sys.executable, "-c", QUEUE, mode], text=True, timeout=120).split()
    return int(peak), int(after)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_a_queue_of_large_frames_leaves_only_what_lives_on() -> None:
    peak, after = held("mapped")
    assert peak > 115_000_000
    assert after < 22_000_000
    assert held("as it is")[1] > 60_000_000, "it would go back anyway"
