"""`pagewire keys`: the key pairs of a deployment over TCP, and the list of who may be what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from protocol.keys import ROLES, make_pair, write_secret
from protocol.options import Usage
from protocol.registration import check_name


def make_keys(folder: Path, clients: Sequence[tuple[str, str]]) -> list[str]:
    """Make what is missing of a folder of keys, for clients given as (role, name); returns a line for each file made.

    The scheduler's pair is made once. A client of a name that has a key already is an error: remove the file, and its
    line in `allowed`, to replace it. Raises Usage.
    """
    for role, name in clients:
        check_name(name)
        if name == "scheduler":
            raise Usage(f"scheduler.key is the scheduler's: name another {role}")
        if (folder / f"{name}.key").exists():
            raise Usage(f"{folder / f'{name}.key'} exists: name another {role}, or remove the file and its line in {folder / 'allowed'}")
    made: list[str] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (folder / "scheduler.key").exists():
            pair = make_pair()
            (folder / "scheduler.pub").write_bytes(pair.public + b"\n")  # first: if the other fails, the next call makes both
            write_secret(folder / "scheduler.key", pair)
            made.append(f"{folder / 'scheduler.key'}: the scheduler's --key-file")
            made.append(f"{folder / 'scheduler.pub'}: the --server-key of every frontend and worker")
        lines = []
        for role, name in clients:
            pair = make_pair()
            write_secret(folder / f"{name}.key", pair)
            lines.append(b"%b %b %b\n" % (role.encode(), pair.public, name.encode()))
            made.append(f"{folder / f'{name}.key'}: the --key-file of {role} {name}")
        # One write, appended: a scheduler that reads the list meanwhile sees whole lines.
        fd = os.open(folder / "allowed", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "wb", buffering=0) as file:
            file.write(b"".join(lines))
        made.append(f"{folder / 'allowed'}: the scheduler's --allow-file ({', '.join(name for _, name in clients) or 'nobody new'})")
    except OSError as error:
        raise Usage(f"{error.filename or folder}: {error.strerror}") from None
    return made


def parse_clients(frontends: Sequence[str], workers: Sequence[str]) -> list[tuple[str, str]]:
    """(role, name) of every client named on the command line, each once. Raises Usage."""
    clients = [(role, name) for role, names in zip(ROLES, (frontends, workers), strict=True) for name in names]
    names = [name for _, name in clients]
    if len(set(names)) != len(names):
        raise Usage("every client needs a name of its own")
    return clients
