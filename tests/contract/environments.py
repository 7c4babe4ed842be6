"""Environments of clients, each its own: litellm, say, asks for another openai than the oldest one that is tested."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from protocol.files import held


def cache() -> Path:
    """Where environments are kept between test sessions."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagewire-tests"


def environment(*requirements: str) -> Path:
    """The interpreter of an environment that holds these. Made once. Raises CalledProcessError if it cannot be."""
    digest = hashlib.sha256("\n".join((sys.version, *requirements)).encode()).hexdigest()[:12]
    folder = cache() / digest
    python, made = folder / "bin" / "python", folder / "made"
    cache().mkdir(parents=True, exist_ok=True)
    with held(cache()):  # another test session may want the same one
        if not made.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=120)
            subprocess.run([str(python), "-m", "pip", "install", "-q", *requirements], check=True, timeout=300)
            made.touch()
    return python
