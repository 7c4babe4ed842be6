"""`pagewire trace` where something else than an admin server answers, or breaks off; prompts that nobody could mean."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from pagewire.admin import AdminSettings
from pagewire.admin_server import app, run
from pagewire.cli import main
from protocol.service import CannotRun


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "gives no trace: is an admin server there?"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "gives no trace: is an admin server there?"),
        (b"HTTP/1.1 200 OK\r\n\r\n[]", "gives no trace: is an admin server there?"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "cannot reach"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "cannot reach"),
        (b'HTTP/1.1 409 X\r\n\r\n{"error": {"message": "busy"}}', "seconds=5: busy"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n<html>\n<body>", "seconds=5: status 404 Not Found"),
    ],
)
def test_a_trace_of_something_else_is_one_line(tmp_path: Path, answer: bytes, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def once() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=once)
        thread.start()
        admin = f"http://127.0.0.1:{server.getsockname()[1]}"
        result = CliRunner().invoke(main, ["trace", "--admin", admin, "--output", str(tmp_path / "t.json")])
        thread.join()
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert words in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "t.json").exists()


def test_a_prompt_that_is_nested_without_end_is_refused() -> None:
    served = app(None, None, None, None, None, None, "http://127.0.0.1:1")  # type: ignore[arg-type]  # it needs none of them
    answer = TestClient(served).post("/prompt", content="[" * 100_000, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


def test_an_api_that_no_prompt_could_go_to_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match=r"--api 127\.0\.0\.1:8000: no URL such as http://"):
        run(AdminSettings(tmp_path, api="127.0.0.1:8000"))
