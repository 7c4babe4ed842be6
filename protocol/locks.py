"""What only one process may hold: a file, or the right to bind an endpoint. The kernel lets go when the holder dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from protocol.files import RunDirError, make_private

PATIENCE = 0.3  # seconds to wait for whoever cleans up behind the dead, who holds each lock for a moment
IPC_LIMIT = 100  # bytes of an ipc path; the kernel's sockaddr_un ends at 107


class Busy(RunDirError):
    """Something that only one process may hold is held; `pid` is the holder, 0 if it did not say."""

    def __init__(self, what: str, pid: int) -> None:
        super().__init__(f"{what} is in use by process {pid}" if pid else f"{what} is in use by another process")
        self.pid = pid


class Lock:
    """An exclusive `flock` on a file that exists only while it is held.

    Raises Busy if another process holds it, and goes on to for `patience` seconds. The kernel lets go when the holder
    dies, however it dies.
    """

    def __init__(self, path: Path, what: str = "", patience: float = 0.0) -> None:
        self.path = path
        deadline = time.monotonic() + patience
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(fd, 20, 0)
                os.close(fd)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                raise Busy(what or str(path), int(holder) if holder.isdigit() else 0) from None
            # A holder that went away between open and flock has unlinked the file we now hold: take the new one.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    break
            os.close(fd)
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        except OSError as error:
            os.close(fd)
            error.filename = str(path)  # which disk is full
            raise
        self._fd = fd

    def release(self) -> None:
        """Remove the file and let go. Harmless when repeated."""
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Guard:
    """The right to bind an endpoint, and to remove its socket file afterwards.

    Binding a live ipc path would steal it in silence, so an `ipc://` endpoint is bound only under its lock.
    A stale socket file is removed. For other transports there is nothing to guard. Raises Busy.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._lock: Lock | None = None
        self._socket = ipc_path(endpoint)
        if self._socket is not None:
            if len(os.fsencode(self._socket)) >= IPC_LIMIT:
                raise RunDirError(f"{endpoint}: an ipc path must be shorter than {IPC_LIMIT} bytes")
            make_private(self._socket.parent)
            self._lock = Lock(self._socket.with_name(self._socket.name + ".lock"), endpoint, PATIENCE)
            self._socket.unlink(missing_ok=True)

    def release(self) -> None:
        """Remove socket file and lock; call it after the socket is closed. Harmless when repeated."""
        if self._lock is not None and self._socket is not None:
            self._socket.unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def ipc_path(endpoint: str) -> Path | None:
    """The file of an `ipc://` endpoint; None for other transports."""
    return Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
