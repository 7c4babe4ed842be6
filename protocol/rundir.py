"""The run directory: where the services of one deployment find each other, and what they leave behind.

    RUN_DIR/frontends.sock, workers.sock, telemetry.sock, tap-NAME.sock   sockets, each guarded by a `.lock` beside it
    RUN_DIR/services/NAME.json    one per running service (`pagewire ps`)
    RUN_DIR/logs/NAME.log         rotated
    RUN_DIR/flight/               flight recorders, written on a crash or a fenced session
    RUN_DIR/hash.key, epoch       the deployment's hash key; the last scheduler's epoch

Sockets live in a private folder with a short path: in the run directory if it is one, else in a folder of the
temporary directory named by a hash of the run directory's path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

IPC_LIMIT = 100  # bytes of an ipc path; the kernel's sockaddr_un ends at 107
LONGEST_NAME = 24  # of a service; its tap's socket has the longest path of all
LONGEST_SOCKET = len("/tap-") + LONGEST_NAME + len(".sock")
KEY_BYTES = 16


class RunDirError(Exception):
    """The run directory cannot be used; the message is one line for the user."""


class Busy(RunDirError):
    """Something that only one process may hold is held; `pid` is the holder, 0 if it did not say."""

    def __init__(self, what: str, pid: int) -> None:
        super().__init__(f"{what} is in use by process {pid}" if pid else f"{what} is in use by another process")
        self.pid = pid


def default_run_dir() -> Path:
    """`$XDG_RUNTIME_DIR/pagewire/HASH`, else a folder of the temporary directory; HASH is the working directory's."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and _is_private(Path(runtime)):
        base = Path(runtime) / "pagewire"
    else:
        base = Path(tempfile.gettempdir()) / f"pagewire-{os.getuid()}"
        _make_private(base)
        if not _is_private(base):
            raise RunDirError(f"{base} belongs to somebody else or is open to others: name a run directory (--run-dir)")
    return base / _digest(os.getcwd())


def process_start(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold anything
    return 0 if fields[0] in "ZX" else int(fields[19])


def new_incarnation() -> int:
    """A random number that names this start of this process. 52 bits, so that JSON readers keep it exact."""
    return int.from_bytes(os.urandom(8), "big") >> 12 | 1


@dataclass(frozen=True)
class ServiceRecord:
    """A service as its file in the run directory tells it."""

    role: str  # frontend, scheduler, worker, admin
    name: str
    pid: int
    incarnation: int
    state: str  # starting, loading, waiting, ready, stopping
    started: int  # clock ticks since boot, which tells a recycled pid apart
    url: str = ""  # where it serves HTTP, as a client on this host names it; empty: it does not, or not yet

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return process_start(self.pid) == self.started


class Lock:
    """An exclusive `flock` on a file that exists only while it is held.

    Raises Busy if another process holds it. The kernel lets go when the holder dies, however it dies.
    """

    def __init__(self, path: Path, what: str = "") -> None:
        self.path = path
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(fd, 20, 0)
                os.close(fd)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise Busy(what or str(path), int(holder) if holder.isdigit() else 0) from None
            # A holder that went away between open and flock has unlinked the file we now hold: take the new one.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    break
            os.close(fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
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
            _make_private(self._socket.parent)
            self._lock = Lock(self._socket.with_name(self._socket.name + ".lock"), endpoint)
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


class RunDir:
    """A run directory, made if it does not exist. Raises RunDirError."""

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = (Path(path) if path else default_run_dir()).expanduser().absolute()
        try:
            _make_private(self.path)
            for folder in (self.logs, self.flight, self._services):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"run directory {self.path}: {error.strerror}") from error
        self.sockets = self._socket_folder()

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

    def _socket_folder(self) -> Path:
        if len(os.fsencode(self.path)) + LONGEST_SOCKET < IPC_LIMIT and _is_private(self.path):
            return self.path
        name = f"pagewire-{os.getuid()}-{_digest(str(self.path.resolve()))}"
        for base in (tempfile.gettempdir(), "/tmp"):
            folder = Path(base) / name
            if len(os.fsencode(folder)) + LONGEST_SOCKET < IPC_LIMIT:
                _make_private(folder)
                if not _is_private(folder):
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
        return Lock(self.path / "up.lock", f"run directory {self.path}")

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
        with contextlib.suppress(FileExistsError), _temporary(path, os.urandom(KEY_BYTES)) as made:
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
        _write(self.path / "hash.key", key)

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
        with _held(self.path):
            epoch = 1 + max(seen, self.epoch())
            _write(self.path / "epoch", str(epoch).encode())
        return epoch


class Registration:
    """This process's file in `services/`; the name is held by a lock as long as the process lives."""

    def __init__(self, folder: Path, role: str, name: str, incarnation: int) -> None:
        check_name(name)
        self._lock = Lock(folder / f"{name}.lock", f"the service name {name}")
        self._path = folder / f"{name}.json"
        pid = os.getpid()
        self.record = ServiceRecord(role, name, pid, incarnation, "starting", process_start(pid))
        self._store()

    def state(self, state: str) -> None:
        """Tell what the service is doing: loading, waiting, ready, stopping."""
        if state != self.record.state:
            self.record = replace(self.record, state=state)
            self._store()

    def serves(self, url: str) -> None:
        """Tell where the service answers HTTP."""
        self.record = replace(self.record, url=url)
        self._store()

    def remove(self) -> None:
        """The service is gone. Harmless when repeated."""
        self._path.unlink(missing_ok=True)
        self._lock.release()

    def _store(self) -> None:
        _write(self._path, json.dumps(asdict(self.record)).encode())


def check_name(name: str) -> None:
    """Raise RunDirError if a service cannot be called so."""
    if not 0 < len(name) <= LONGEST_NAME or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name) or name[0] == ".":
        raise RunDirError(f"{name!r} is no service name: 1 to {LONGEST_NAME} letters, digits, '-', '_' and '.'")


def ipc_path(endpoint: str) -> Path | None:
    """The file of an `ipc://` endpoint; None for other transports."""
    return Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=6).hexdigest()


def _is_private(path: Path) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o077


def _make_private(path: Path) -> None:
    """Make a folder of mode 0700, and its parents likewise. One that exists is left as it is."""
    if not path.is_dir():
        _make_private(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Wait for, and hold, the flock of a folder itself: it leaves no file behind."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _temporary(path: Path, content: bytes) -> Iterator[Path]:
    """A file beside `path` with this content, mode 0600, gone afterwards unless it was renamed."""
    made = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, content)
        os.close(fd)
        yield made
    finally:
        made.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    """Replace a file's content atomically."""
    with _temporary(path, content) as made:
        made.replace(path)
