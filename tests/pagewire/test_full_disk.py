"""Commands on a disk that takes nothing more: one line, and nothing half made in the way of the next try."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pagewire.cli import main
from pagewire.handover import leave
from pagewire.monitor import Sums
from protocol.keys import read_pair
from protocol.locks import Lock


def no_room(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("arguments", [["ps", "--help"], ["plan"]])
def test_an_output_that_takes_nothing_is_one_line(arguments: Sequence[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-P", "-m", "pagewire", *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


def test_a_lock_that_cannot_be_written_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", no_room)
    with pytest.raises(OSError, match=r"No space left on device: .*up\.lock"):
        Lock(tmp_path / "up.lock")
    monkeypatch.undo()
    with Lock(tmp_path / "up.lock"):  # nobody holds it
        pass


@pytest.mark.parametrize("name", ["scheduler.pub", "scheduler.key", "w.key", "allowed"])
def test_keys_that_could_not_be_written_are_made_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    fdopen, open_ = os.fdopen, os.open
    opened: dict[int, str] = {}

    def watch(path: Any, *arguments: Any, **keywords: Any) -> int:
        fd = open_(path, *arguments, **keywords)
        opened[fd] = Path(path).name
        return fd

    def write(fd: int, *arguments: Any, **keywords: Any) -> Any:
        file = fdopen(fd, *arguments, **keywords)
        if opened.get(fd) == name:
            file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return file

    monkeypatch.setattr(os, "open", watch)
    monkeypatch.setattr(os, "fdopen", write)
    if name == "scheduler.pub":
        monkeypatch.setattr(Path, "write_bytes", no_room)
    refused = CliRunner().invoke(main, ["keys", str(folder), "--worker", "w"])
    assert refused.exit_code == 2
    assert "No space left on device" in refused.output
    assert str(folder) in refused.output
    monkeypatch.undo()
    if name == "allowed":  # the key is there, and its owner is told
        (folder / "w.key").unlink()
    assert CliRunner().invoke(main, ["keys", str(folder), "--worker", "w"]).exit_code == 0
    pair = read_pair(folder / "scheduler.key", "--key-file")
    assert (folder / "scheduler.pub").read_bytes() == pair.public + b"\n"
    assert (folder / "allowed").read_text().startswith("worker ")


def test_an_admin_server_that_cannot_leave_its_sums_ends_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", no_room)
    leave(tmp_path / "monitor.json", Sums(0.0, 1.0, {}, {}))
    assert not (tmp_path / "monitor.json").exists()
