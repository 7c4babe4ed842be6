"""`pagewire bench` against servers that end early, answer nonsense or nothing, and its end by Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from pagewire.bench.exchange import Exchange, Record
from tests.pagewire.processes import PATIENCE, eventually
from tests.pagewire.scripted_server import Script, scripted_server
from tests.pagewire.test_bench_command import bench, event

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


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost:8000", "http://", "ftp://127.0.0.1", "http://[::1", "http://a:b"])
def test_what_is_no_url_is_refused_in_one_line(url: str) -> None:
    result = bench("serve", "--url", url)
    assert result.exit_code == 2
    assert f"{url!r} is no URL such as http://" in result.output


def test_a_name_that_no_host_can_have_is_a_failed_request() -> None:
    result = bench("serve", "--url", "http://a..b", "--num-prompts", "1", "--input", "2", "--output", "2")
    assert result.exit_code == 1
    assert "cannot connect" in result.output


def test_a_server_that_speaks_no_http_gets_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        greeting = threading.Thread(target=greet)
        greeting.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        result = bench("serve", "--url", url)
        greeting.join()
    assert (result.exit_code, result.output) == (1, f"Error: cannot reach {url}: SSH-2.0-OpenSSH_9.2\n")


@pytest.mark.parametrize("flag", ["--burstiness", "--temperature"])
def test_nan_is_no_number(flag: str) -> None:
    result = bench("serve", "--url", "http://127.0.0.1:1", flag, "nan")
    assert (result.exit_code, "nan is no number" in result.output) == (2, True)


@pytest.mark.parametrize("limit", ["nan", "0", "-1"])
def test_an_objective_is_above_0(limit: str) -> None:
    assert bench("serve", "--url", "http://127.0.0.1:1", "--goodput", f"ttft:{limit}").exit_code == 2


@pytest.mark.parametrize("pairs", ["[[0, 5]]", "[[5, 0]]", "[[1e400, 1]]", "[" * 100_000])
def test_lengths_that_none_can_be_are_refused(tmp_path: Path, pairs: str) -> None:
    (tmp_path / "lengths.json").write_text(pairs)
    with scripted_server(Script()) as url:
        result = bench("serve", "--url", url, "--lengths", tmp_path / "lengths.json")
    assert result.exit_code == 2
    assert "is no JSON list of [prompt, output] lengths" in result.output


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = Script()
    with scripted_server(script) as url:
        result = bench("serve", "--url", url, "--plot", tmp_path / "a.xyz")
    assert (result.exit_code, script.asked) == (2, [])
    assert "no picture has the format .xyz" in result.output


# ---------------------------------------------------------------- results beside one another


def test_a_result_of_vllm_is_compared_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    theirs, picture = tmp_path / "vllm.json", tmp_path / "both.png"
    theirs.write_text('{"date": "x", "duration": 2.0, "completed": 3, "mean_ttft_ms": 4.0}')
    result = bench("serve", "--compare", theirs, theirs, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "mean_ttft_ms" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_was_not_measured_alike_is_named(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    run = {"duration": 2.0, "completed": 3}
    a.write_text(json.dumps({"settings": {"api": "chat", "url": "x", "seed": 0, "input": [1, 2]}, "runs": [run]}))
    b.write_text(json.dumps({"settings": {"api": "completions", "url": "y", "seed": 0, "batch_size": 4}, "runs": [run]}))
    lines = bench("serve", "--compare", a, b).output.splitlines()
    assert [line for line in lines if line.startswith("not alike")] == [
        'not alike: api "chat" and "completions"',
        "not alike: input [1, 2] and null",
        "not alike: batch_size null and 4",
    ]
    assert "not alike" not in bench("serve", "--compare", a, a).output


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "[]", '{"runs": []}', '{"runs": {"0": {"duration": 1}}}', ""])
def test_a_file_that_is_no_result_is_said_once(tmp_path: Path, content: str) -> None:
    (tmp_path / "odd.json").write_text(content)
    result = bench("serve", "--compare", tmp_path / "odd.json", tmp_path / "odd.json")
    assert result.exit_code == 2
    assert result.output.count("is no result of a bench") == 1


def test_records_are_read_only_where_they_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"settings": {}, "runs": [{"duration": 2.0, "completed": 3, "records": [{"odd": 1}]}]}))
    result = bench("serve", "--compare", tmp_path / "a.json", tmp_path / "a.json")
    assert (result.exit_code, result.exception) == (0, None)
    assert "completed" in result.output
