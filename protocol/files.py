"""Folders that belong to this user alone, and files in them that are written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class RunDirError(Exception):
    """The run directory cannot be used; the message is one line for the user."""


def is_private(path: Path) -> bool:
    """Whether a file or folder is this user's and closed to all others."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o077


def make_private(path: Path) -> None:
    """Make a folder of mode 0700, and its parents likewise. One that exists is left as it is."""
    if not path.is_dir():
        make_private(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Wait for, and hold, the flock of a folder itself: it leaves no file behind."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def temporary(path: Path, content: bytes) -> Iterator[Path]:
    """A file beside `path` with this content, mode 0600, gone afterwards unless it was renamed."""
    made = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, content)
        os.close(fd)
        yield made
    finally:
        made.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Replace a file's content atomically."""
    with temporary(path, content) as made:
        made.replace(path)
