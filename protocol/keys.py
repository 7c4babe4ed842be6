"""Keys of links between hosts: CurveZMQ (RFC 26) encrypts, and an allow-list says which key may be what (ZAP, RFC 27).

    FOLDER/scheduler.key       the scheduler's secret key        --key-file, at the scheduler
    FOLDER/scheduler.pub       its public key                    --server-key, at frontends and workers
    FOLDER/NAME.key            a client's secret key             --key-file, at that client
    FOLDER/allowed             `role public-key name` a line     --allow-file, at the scheduler

Keys are Z85 text (RFC 32). A file with a secret key is its owner's alone (mode 0600).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from protocol.counters import Counters
from protocol.service import CannotRun

ROLES = ("frontend", "worker")
KEY_LENGTH = 40  # characters of Z85
ZAP = "inproc://zeromq.zap.01"


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair, in Z85."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class ClientKeys:
    """What a peer needs for a link under CURVE: its own pair, and the scheduler's public key."""

    own: KeyPair
    server: bytes

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket speak CURVE; before it connects."""
        socket.curve_publickey = self.own.public
        socket.curve_secretkey = self.own.secret
        socket.curve_serverkey = self.server


@dataclass(frozen=True)
class ServerKeys:
    """What a scheduler needs: its own pair. Whom it lets in, an `Authenticator` of the same context decides."""

    own: KeyPair

    def apply(self, socket: zmq.Socket[bytes], role: str) -> None:
        """Make a socket take only CURVE, and only peers of one role; before it binds."""
        socket.curve_server = True
        socket.curve_secretkey = self.own.secret
        socket.zap_domain = role.encode()
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an authenticator nobody gets in


# ---------------------------------------------------------------- files


def make_pair() -> KeyPair:
    """A new random key pair."""
    return KeyPair(*zmq.curve_keypair())


def write_secret(path: Path, pair: KeyPair) -> None:
    """Write a secret key to a new file of mode 0600. Raises FileExistsError: a key in use is never overwritten."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(pair.secret + b"\n")
    except OSError as error:
        path.unlink(missing_ok=True)  # half a key would stand in the way of the next
        error.filename = str(path)
        raise


def read_pair(path: str | Path, flag: str) -> KeyPair:
    """The pair of a secret key's file. Raises CannotRun, also if others may read the file."""
    secret = _read_key(path, flag)
    if os.stat(path).st_mode & 0o077:
        raise CannotRun(f"{flag} {path}: others may read this secret key; chmod 600 it")
    return KeyPair(zmq.curve_public(secret), secret)


def client_keys(key_file: str, server_key: str) -> ClientKeys | None:
    """The keys that a peer's settings name; None if they name none. Raises CannotRun."""
    if not key_file and not server_key:
        return None
    if not key_file or not server_key:
        raise CannotRun("--key-file and --server-key belong together: this service's secret key, and the scheduler's public one")
    return ClientKeys(read_pair(key_file, "--key-file"), _read_key(server_key, "--server-key"))


def _read_key(path: str | Path, flag: str) -> bytes:
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise CannotRun(f"{flag} {path}: {error.strerror}") from None
    if not is_key(key):
        raise CannotRun(f"{flag} {path}: this file holds no key of {KEY_LENGTH} Z85 characters")
    return key


def is_key(text: bytes) -> bool:
    """Whether this is a key in Z85."""
    if len(text) != KEY_LENGTH:
        return False
    with contextlib.suppress(zmq.ZMQError):
        zmq.curve_public(text)
        return True
    return False


# ---------------------------------------------------------------- who may be what


class AllowList:
    """The public keys of a file and the role of each. The file is read again when it has changed.

    A line is `role public-key name`; empty lines and those that begin with `#` do not count. Raises CannotRun.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._stamp: tuple[int, int, int] = (0, 0, 0)
        self._allowed: dict[bytes, tuple[str, str]] = {}
        self._read()

    def who(self, key: bytes) -> tuple[str, str] | None:
        """(role, name) of a public key; None if it is not listed. A file that cannot be read any more lists nobody."""
        try:
            if self._stamp != self._look():
                self._read()
        except (CannotRun, OSError):
            self._allowed, self._stamp = {}, (0, 0, 0)
        return self._allowed.get(key)

    def _look(self) -> tuple[int, int, int]:
        status = os.stat(self._path)
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> None:
        try:
            self._stamp = self._look()
            lines = self._path.read_bytes().splitlines()
        except OSError as error:
            raise CannotRun(f"--allow-file {self._path}: {error.strerror}") from None
        allowed: dict[bytes, tuple[str, str]] = {}
        for number, line in enumerate(lines, 1):
            words = line.split(None, 2)
            if not words or line.lstrip().startswith(b"#"):
                continue
            role = words[0].decode(errors="replace")
            if len(words) < 2 or role not in ROLES or not is_key(words[1]):
                raise CannotRun(f"--allow-file {self._path}, line {number}: a line is `frontend|worker PUBLIC-KEY NAME`")
            allowed[words[1]] = (role, words[2].decode(errors="replace") if len(words) == 3 else "")
        self._allowed = allowed


class Authenticator:
    """Answers ZeroMQ's question whether a peer may connect (ZAP), for all sockets of a context.

    It must exist before those sockets are bound, and be asked (`answer`) when `socket` is readable.
    """

    def __init__(self, context: zmq.Context[Any], allowed: AllowList, counters: Counters) -> None:
        self._allowed = allowed
        self._counters = counters
        self.socket: zmq.Socket[bytes] = zmq.Socket(context, zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP)

    def answer(self) -> None:
        """Answer all questions that have come."""
        with contextlib.suppress(zmq.Again):
            while True:
                question = self.socket.recv_multipart(zmq.DONTWAIT)
                name = self._judge(question)
                status, text = (b"200", b"OK") if name is not None else (b"400", b"this key is not allowed here")
                self.socket.send_multipart([b"1.0", question[1], status, text, (name or "").encode(), b""])

    def close(self) -> None:
        """Close the socket; nobody gets in any more."""
        self.socket.close()

    def _judge(self, question: list[bytes]) -> str | None:
        """The peer's name for [version, number, domain, address, identity, mechanism, key]; None: it stays out."""
        _, _, domain, _, _, mechanism, *keys = question
        if mechanism != b"CURVE" or len(keys) != 1:
            self._counters.add("key_missing")
            return None
        who = self._allowed.who(z85.encode(keys[0]))
        if who is None:
            self._counters.add("key_unknown")
        elif who[0].encode() != domain:
            self._counters.add(f"key_of_a_{who[0]}_refused")
        else:
            return who[1]
        return None
