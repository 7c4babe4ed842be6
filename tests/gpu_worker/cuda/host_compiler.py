"""The C++ compiler with which kernels' sources are compiled for the CPU."""

from __future__ import annotations

import os
import shutil

import pytest


def compiler() -> str:
    """Its path. Without one the test is skipped, and fails in CI."""
    found = shutil.which("g++")
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("there is no g++ (apt-get install g++)")
    if found is None:
        pytest.skip("needs g++")
    return found
