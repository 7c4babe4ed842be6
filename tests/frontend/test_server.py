"""The frontend as a process, over real sockets in front and behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from frontend.server import raise_file_limit
from protocol.messages import Abort, Done
from protocol.rundir import RunDir
from tests.e2e.stack import eventually
from tests.frontend.fakes import Engine, scheduler_thread, text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A private run directory whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as path:
        yield Path(path)


class Frontend:
    """A running `python -m frontend`."""

    def __init__(self, run_dir: Path, *flags: str, pass_fds: tuple[int, ...] = ()) -> None:
        command = [sys.executable, "-P", "-m", "frontend", "--run-dir", str(run_dir), "--port", "0", *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=pass_fds, env=environment, cwd=ROOT
        )
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line.startswith("listening on http"):
            self.process.kill()
            raise AssertionError(f"no address but {line!r}: {self.process.communicate()[1]}")
        self.url = line.split()[-1]

    def wait_ready(self) -> None:
        eventually(lambda: httpx.get(self.url + "/ready", timeout=60).status_code == 200)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def frontend(run_dir: Path, *flags: str, pass_fds: tuple[int, ...] = ()) -> Iterator[Frontend]:
    running = Frontend(run_dir, *flags, pass_fds=pass_fds)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


@pytest.fixture
def scheduled(run_dir: Path) -> Iterator[Engine]:
    """A scheduler in the run directory, behind an engine that can be slowed."""
    engine = Engine()
    with scheduler_thread(RunDir(run_dir).frontends, engine, interval=0.01):
        yield engine


@pytest.mark.slow
def test_it_serves_and_ends_at_once_when_idle(run_dir, scheduled):
    with frontend(run_dir, "--shutdown-timeout", "60") as running:
        running.wait_ready()
        assert httpx.post(running.url + "/generate", json={"prompt": "x", "max_tokens": 5}, timeout=60).json()["text"] == text(5)
        body = {"prompt": "x", "max_tokens": 5, "stream": True}
        with httpx.stream("POST", running.url + "/v1/completions", json=body, timeout=60) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]) == text(5)
        start = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - start < 30, "nothing was running: no reason to wait out the shutdown timeout"
    assert [record for record in RunDir(run_dir).services() if record.role == "frontend"] == []


@pytest.mark.slow
def test_sigterm_lets_short_streams_finish_and_ends_long_ones_with_an_error(run_dir):
    """Short ones take a second, the timeout is 6 s, long ones take 15: a machine may stand still for seconds."""
    engine = Engine()
    with scheduler_thread(RunDir(run_dir).frontends, engine, interval=0.03), frontend(run_dir, "--shutdown-timeout", "6") as running:
        running.wait_ready()
        bodies: dict[int, str] = {}

        def ask(tokens: int) -> None:
            body = {"prompt": "x", "max_tokens": tokens, "stream": True}
            bodies[tokens] = httpx.post(running.url + "/v1/completions", json=body, timeout=60).text

        threads = [threading.Thread(target=ask, args=(tokens,)) for tokens in (30, 500)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(engine.live) == 2)
        running.process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses(running.url))
        for thread in threads:
            thread.join(60)
        assert running.process.wait(60) == 0
    short, long = ([line[6:] for line in bodies[n].splitlines() if line.startswith("data: ")] for n in (30, 500))
    assert json.loads(short[-2])["choices"][0]["finish_reason"] == "length"
    assert json.loads(long[-2])["error"]["code"] == "shutting_down"
    assert short[-1] == long[-1] == "[DONE]"


def refuses(url: str) -> bool:
    """Whether nobody listens any more."""
    try:
        httpx.get(url + "/health", timeout=60)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # it listened, and ended before it answered
        pass
    return False


@pytest.mark.slow
def test_a_client_that_does_not_read_cannot_hold_up_the_end(run_dir, scheduled):
    scheduled.token = lambda submit, choice, i: ord("\\")  # 7 bytes of JSON a token
    with frontend(run_dir, "--shutdown-timeout", "0.5") as running:
        running.wait_ready()
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps({"prompt": "x", "max_tokens": 500, "stream": True, "n": 100}).encode()
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            eventually(lambda: scheduled.live)
            time.sleep(0.5)
            assert running.stop() == 0, "it was held up, until its own timer killed it"


@pytest.mark.slow
def test_a_stop_cuts_a_drain_short_though_a_request_never_arrives_in_full(run_dir, scheduled):
    with frontend(run_dir, "--shutdown-timeout", "0.3", "--drain-timeout", "60") as running:
        running.wait_ready()
        address = httpx.URL(running.url)
        with socket.create_connection((address.host, address.port)) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            httpx.get(running.url + "/health", timeout=60)  # by when this is answered, that has been read
            running.process.send_signal(signal.SIGUSR2)
            time.sleep(0.5)
            assert running.process.poll() is None
            assert running.stop() == 0


@pytest.mark.slow
def test_the_blocks_of_a_client_that_left_are_given_back(run_dir, scheduled):
    with frontend(run_dir) as running:
        running.wait_ready()
        body = {"prompt": "x", "max_tokens": 500, "stream": True}
        with httpx.stream("POST", running.url + "/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
        eventually(lambda: any(isinstance(m, Done) for m in list(scheduled.messages)))  # the scheduler has heard that the client left
        assert any(isinstance(m, Abort) for m in scheduled.messages)
        assert running.stop() == 0


@pytest.mark.slow
def test_a_socket_handed_over_is_served(run_dir, scheduled):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with frontend(run_dir, "--listen-fd", str(listener.fileno()), pass_fds=(listener.fileno(),)) as running:
            assert running.url == f"http://127.0.0.1:{port}"
            assert httpx.get(running.url + "/health", timeout=60).json() == {"status": "ok"}
            assert running.stop() == 0


def test_it_may_open_as_many_files_as_the_system_allows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_what_is_no_http_is_refused_in_json(run_dir):
    frontend = Frontend(run_dir)
    try:
        host, _, port = frontend.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
    finally:
        assert frontend.stop() == 0
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_port_that_is_taken_gets_one_clear_line(run_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "frontend", "--run-dir", str(run_dir), "--port", str(port)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode != 0
    assert f"127.0.0.1:{port}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_without_a_scheduler_it_waits_says_so_once_and_uses_no_processor(run_dir):
    with frontend(run_dir) as running:
        assert any(_cpu_of_two_seconds(running.process.pid) < 0.1 for _ in range(3))  # it may still be starting
        ready = httpx.get(running.url + "/ready", timeout=60)
        assert (ready.status_code, ready.json()["reason"]) == (503, "no scheduler has answered yet")
        assert running.stop() == 0
        log = (RunDir(run_dir).logs / "frontend-0.log").read_text()
    assert log.count("waiting for a scheduler") == 1


def _cpu_of_two_seconds(pid: int) -> float:
    before = _cpu(pid)
    time.sleep(2.0)
    return _cpu(pid) - before


def _cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_tls_answers_and_plain_http_does_not(run_dir, scheduled):
    names = ["-keyout", str(run_dir / "key.pem"), "-out", str(run_dir / "cert.pem"), "-subj", "/CN=localhost", "-days", "1"]
    san = ["-addext", "subjectAltName=IP:127.0.0.1"]
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *names, *san], capture_output=True, timeout=60)
    assert made.returncode == 0, made.stderr
    frontend = Frontend(run_dir, "--ssl-certfile", str(run_dir / "cert.pem"), "--ssl-keyfile", str(run_dir / "key.pem"))
    try:
        assert frontend.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(run_dir / "cert.pem"))
        assert httpx.get(frontend.url + "/health", verify=trusted, timeout=60).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(frontend.url + "/health", timeout=60)  # nobody vouches for this certificate
        with pytest.raises(httpx.HTTPError):
            httpx.get(frontend.url.replace("https", "http") + "/health", timeout=60)
    finally:
        assert frontend.stop() == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", "/nonexistent"], "--api-key-file"),
        (["--ssl-certfile", "/nonexistent"], "--ssl-certfile"),
    ],
)
def test_what_would_be_unsafe_gets_one_line_and_no_server(flags, says, run_dir):
    command = [sys.executable, "-P", "-m", "frontend", "--run-dir", str(run_dir), "--port", "0", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    assert ended.returncode != 0
    assert "listening" not in ended.stdout
    assert says in ended.stderr.strip().splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_name_that_no_host_can_have_gets_one_clear_line(run_dir):
    command = [sys.executable, "-P", "-m", "frontend", "--run-dir", str(run_dir), "--port", "0", "--host", "a..b", "--no-auth"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    assert "cannot listen on a..b:0: no name of a host" in done.stderr
    assert "Traceback" not in done.stderr
