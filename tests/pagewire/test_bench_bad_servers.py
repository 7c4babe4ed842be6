"""`pagewire bench` against servers that end early, answer nonsense or nothing, and its end by Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pagewire.bench.exchange import Exchange, Record
from tests.pagewire.processes import PATIENCE, eventually
from tests.pagewire.scripted_server import Script, scripted_server
from tests.pagewire.test_bench_command import event

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = {"choices": [{"text": "a", "index": 0}]}
PLAIN = b"HTTP/1.1 200 OK\r\n\r\n"  # it goes on until the connection ends


def seen(response: bytes) -> Record:
    """What is noted of a streamed answer after which the server closes the connection."""

    class Transport:
        def write(self, data: bytes) -> None: ...
        def close(self) -> None: ...

    async def run() -> Record:
        record = Record(0.0)
        exchange = Exchange(b"", b"", record, True, False)
        exchange.connection_made(Transport())  # type: ignore[arg-type]
        exchange.data_received(response)
        exchange.connection_lost(None)
        await asyncio.wait_for(exchange.done, PATIENCE)
        return record

    return asyncio.run(run())


@pytest.mark.parametrize("response", [CHUNKED + event(PIECE) + b"0\r\n\r\n", PLAIN + b'data: {"choices": [{"text": "a"}]}\n\n'])
def test_a_stream_that_ends_before_it_says_so_has_failed(response: bytes) -> None:
    assert seen(response).error == "the stream ended without [DONE]"


def test_a_stream_that_goes_on_until_the_connection_ends_may_be_whole() -> None:
    record = seen(PLAIN + b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n')
    assert (record.error, record.chunks) == ("", 1)


def test_an_event_that_is_no_object_is_a_bad_response() -> None:
    assert "list instead of an object" in seen(CHUNKED + event([])).error


def group(pid: int) -> list[int]:
    """Who lives in a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@pytest.mark.slow
def test_ctrl_c_ends_a_measurement_and_its_clients_without_a_stack(tmp_path: Path) -> None:
    script = Script(wait=10 * PATIENCE)
    said = tmp_path / "said"
    with scripted_server(script) as url, said.open("wb") as file:
        command = [sys.executable, "-P", "-m", "pagewire", "bench", "serve", "--url", url, "--num-prompts", "2", "--processes", "2"]
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            eventually(lambda: script.running == 2)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            assert process.wait(PATIENCE) == 1
            eventually(lambda: not group(process.pid))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert "Aborted" in said.read_text()
    assert "Traceback" not in said.read_text()
