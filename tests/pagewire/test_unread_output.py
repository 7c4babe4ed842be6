"""`pagewire up` whose output nobody reads any more, has no room on its disk, or has none: it serves, and what dies comes back."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.rundir import RunDir
from tests.pagewire.processes import PATIENCE, eventually

pytestmark = pytest.mark.slow


def ready(run_dir: Path, but: int = 0) -> int:
    """The pid of a frontend other than `but` that answers requests; 0 if there is none yet."""
    record = next((record for record in RunDir(run_dir, make=False).services() if record.role == "frontend" and record.url), None)
    if record is None or record.pid == but:
        return 0
    connection = http.client.HTTPConnection(record.url.removeprefix("http://"), timeout=PATIENCE)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/ready")
        return record.pid if connection.getresponse().status == 200 else 0
    return 0


@pytest.mark.parametrize("output", ["pipe", "full", "closed"])
def test_services_start_again_and_end_in_order(run_dir: Path, output: str) -> None:
    command = [sys.executable, "-P", "-m", "pagewire", "up", "--runner", "oracle", "--port", "0", "--admin-port", "0"]
    command += ["--run-dir", str(run_dir), "--shutdown-timeout", "600"]  # nobody is killed because another took its time
    if output == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    reader, writer = os.pipe()
    os.close(reader)
    if output == "full":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL, start_new_session=True)
    os.close(writer)
    try:
        eventually(lambda: ready(run_dir) > 0)
        first = ready(run_dir)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: ready(run_dir, but=first) > 0)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert list((run_dir / "services").glob("*.json")) == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
