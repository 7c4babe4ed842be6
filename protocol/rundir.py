"""The run directory: where the services of one deployment find each other, and what they leave behind.

    RUN_DIR/frontends.sock, workers.sock, telemetry.sock, tap-NAME.sock   sockets, each guarded by a `.lock` beside it
    RUN_DIR/services/NAME.json    one per running service (`pagewire ps`)
    RUN_DIR/logs/NAME.log         rotated
    RUN_DIR/flight/               flight recorders, written on a crash or a fenced session
    RUN_DIR/hash.key, epoch       the deployment's hash key; the last scheduler's epoch
    RUN_DIR/monitor.json          while the admin server is replaced, its sums

Sockets live in a private folder with a short path: in the run directory if it is one, else in a folder of the
temporary directory named by a hash of the run directory's path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from protocol.files import RunDirError, held, is_private, make_private, temporary, write
from protocol.locks import IPC_LIMIT, PATIENCE, Busy, Lock
from protocol.registration import LONGEST_NAME, Registration, ServiceRecord

LONGEST_SOCKET = len("/tap-") + LONGEST_NAME + len(".sock")
KEY_BYTES = 16


def default_run_dir(make: bool = True) -> Path:
    """`$XDG_RUNTIME_DIR/pagewire/HASH`, else a folder of the temporary directory; HASH is the working directory's.

    The temporary directory is anybody's: the folder in it is made at once, unless nothing is to be (`make`).
    Raises RunDirError if it is somebody else's.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and is_private(Path(runtime)):
        base = Path(runtime) / "pagewire"
    else:
        base = Path(tempfile.gettempdir()) / f"pagewire-{os.getuid()}"
        if make:
            make_private(base)
        if base.exists() and not is_private(base):
            raise RunDirError(f"{base} belongs to somebody else or is open to others: name a run directory (--run-dir)")
    return base / _digest(os.getcwd())


class RunDir:
    """A run directory, made if it does not exist, unless nothing is to be (`make`). Raises RunDirError."""

    def __init__(self, path: Path | str | None = None, make: bool = True) -> None:
        self.path = (Path(path) if path else default_run_dir(make)).expanduser().absolute()
        if make:
            self._make()
        self.sockets = self._socket_folder(make)

    def _make(self) -> None:
        try:
            make_private(self.path)
            for folder in (self.logs, self.flight, self._services):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"run directory {self.path}: {error.strerror}") from error

    @property
    def logs(self) -> Path:
        """Folder of the logs, `NAME.log`."""
        return self.path / "logs"

    @property
    def flight(self) -> Path:
        """Folder of the flight recorders."""
        return self.path / "flight"

    @property
    def _services(self) -> Path:
        return self.path / "services"

    def _socket_folder(self, make: bool) -> Path:
        if len(os.fsencode(self.path)) + LONGEST_SOCKET < IPC_LIMIT and is_private(self.path):
            return self.path
        name = f"pagewire-{os.getuid()}-{_digest(str(self.path.resolve()))}"
        for base in (tempfile.gettempdir(), "/tmp"):
            folder = Path(base) / name
            if len(os.fsencode(folder)) + LONGEST_SOCKET < IPC_LIMIT:
                if make:
                    make_private(folder)
                if folder.exists() and not is_private(folder):
                    raise RunDirError(f"{folder} belongs to somebody else or is open to others; it would hold the sockets")
                return folder
        raise RunDirError(f"run directory {self.path}: its path is too long for sockets, and the temporary directory's too")

    # ------------------------------------------------------------ endpoints

    @property
    def frontends(self) -> str:
        """The endpoint at which the scheduler awaits frontends."""
        return self._endpoint("frontends")

    @property
    def workers(self) -> str:
        """The endpoint at which the scheduler awaits workers."""
        return self._endpoint("workers")

    @property
    def telemetry(self) -> str:
        """The endpoint at which the admin server collects figures."""
        return self._endpoint("telemetry")

    def tap(self, name: str) -> str:
        """The endpoint at which the service `name` mirrors its messages."""
        return self._endpoint(f"tap-{name}")

    def _endpoint(self, name: str) -> str:
        return f"ipc://{self.sockets / name}.sock"

    # ------------------------------------------------------------ who runs here

    def lock(self) -> Lock:
        """The lock of the supervisor. Raises Busy, which names the other one's pid."""
        return Lock(self.path / "up.lock", f"run directory {self.path}", PATIENCE)

    def register(self, role: str, name: str, incarnation: int) -> Registration:
        """Announce this process as a service, in state `starting`. Raises Busy if `name` is taken."""
        return Registration(self._services, role, name, incarnation)

    def services(self) -> list[ServiceRecord]:
        """The services that run here now, by name. Files of dead processes and unreadable ones do not count."""
        return [record for _, record in self._records() if record is not None and record.alive]

    def last_record(self, name: str) -> ServiceRecord | None:
        """What the service `name` last told of itself, dead or alive; None if it ended in order or never was."""
        return next((record for path, record in self._records() if path.stem == name), None)

    def forget(self, name: str, pid: int) -> None:
        """Remove what the dead process `pid` left under its service name."""
        record = self.last_record(name)
        if record is not None and record.pid == pid:
            (self._services / f"{name}.json").unlink(missing_ok=True)

    def _records(self) -> Iterator[tuple[Path, ServiceRecord | None]]:
        for path in sorted(self._services.glob("*.json")):
            try:
                yield path, ServiceRecord(**json.loads(path.read_text()))
            except (OSError, ValueError, TypeError):
                yield path, None

    def clean(self) -> None:
        """Remove what dead processes left: service files, sockets and locks that nobody holds."""
        for path, record in self._records():
            if record is None or not record.alive:
                path.unlink(missing_ok=True)
        for folder in {self.path, self.sockets, self._services}:
            for path in folder.glob("*.lock"):
                if path.name != "up.lock":
                    with contextlib.suppress(Busy, FileNotFoundError), Lock(path):
                        path.with_name(path.name.removesuffix(".lock")).unlink(missing_ok=True)
            for path in folder.glob("*.sock"):
                lock = path.with_name(path.name + ".lock")
                with contextlib.suppress(Busy), Lock(lock):
                    path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the folder of the sockets if it lies apart and is empty."""
        if self.sockets != self.path:
            with contextlib.suppress(OSError):
                self.sockets.rmdir()

    # ------------------------------------------------------------ what outlives a scheduler

    def hash_key(self) -> bytes:
        """The deployment's key for block hashes, 16 random bytes, made by the first who asks."""
        path = self.path / "hash.key"
        with contextlib.suppress(FileExistsError), temporary(path, os.urandom(KEY_BYTES)) as made:
            os.link(made, path)
        key = path.read_bytes()
        if len(key) != KEY_BYTES:
            raise RunDirError(f"{path} must hold {KEY_BYTES} bytes; remove it to have a new one made")
        return key

    def known_hash_key(self) -> bytes:
        """The deployment's key if this run directory knows one, else nothing."""
        return self.hash_key() if (self.path / "hash.key").exists() else b""

    def keep_hash_key(self, key: bytes) -> None:
        """Take over the key that the deployment uses already."""
        write(self.path / "hash.key", key)

    def epoch(self) -> int:
        """The highest epoch that a scheduler of this run directory has claimed; 0 if none has."""
        try:
            return int((self.path / "epoch").read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            raise RunDirError(f"{self.path / 'epoch'} does not hold a number") from None

    def claim_epoch(self, seen: int = 0) -> int:
        """Claim the next epoch: 1 + the highest of `seen` and what stands here. No two calls return the same."""
        with held(self.path):
            epoch = 1 + max(seen, self.epoch())
            write(self.path / "epoch", str(epoch).encode())
        return epoch


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=6).hexdigest()
