"""`pagewire up` and the three services by hand, as processes, with the oracle runner."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol import guardian
from protocol.registration import ServiceRecord
from protocol.rundir import RunDir
from tests.pagewire.processes import Program, eventually, free_port, gone, left_in, running

ROOT = Path(__file__).parents[2]
PAGEWIRE = [sys.executable, "-P", "-m", "pagewire.cli"]
ORACLE = ["--runner", "oracle"]
UNHURRIED = ["--shutdown-timeout", "600"]  # an end in which nobody is killed because another took its time

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def stack(run_dir: Path, *arguments: str) -> Iterator[tuple[Program, str]]:
    """`pagewire up` and the address of its API, once it is ready."""
    command = [*PAGEWIRE, "up", *ORACLE, "--port", "0", "--admin-port", "0", "--run-dir", str(run_dir), *arguments]
    with running(command) as program:
        yield program, address_of(program)


def address_of(program: Program) -> str:
    said = program.read_until("ready: http://")
    return said.split("ready: http://")[1].split()[0]


def post(address: str, path: str, body: dict[str, object], timeout: float = 100.0) -> dict[str, object]:
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer: dict[str, object] = json.loads(response.read())
        assert response.status == 200, answer
        return answer
    finally:
        connection.close()


def get(address: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except OSError:
        return 0, ""
    finally:
        connection.close()


def generate(address: str, prompt: str = "hello") -> str:
    body: dict[str, object] = {"model": "oracle", "prompt": prompt, "max_tokens": 12, "seed": 7}
    answer: dict[str, Any] = post(address, "/v1/completions", body)
    return str(answer["choices"][0]["text"])


def services(run_dir: Path) -> dict[str, ServiceRecord]:
    return {record.name: record for record in RunDir(run_dir).services()}


def all_ready(run_dir: Path, count: int = 4) -> dict[str, ServiceRecord]:
    """The services, once so many are ready: `up` is as soon as a request would be answered, and the others may still be starting."""

    def ready() -> dict[str, ServiceRecord]:
        found = services(run_dir)
        return found if [record.state for record in found.values()] == ["ready"] * count else {}

    return eventually(ready)


def test_up_serves_lists_its_services_and_leaves_nothing_behind(run_dir: Path) -> None:
    with stack(run_dir, *UNHURRIED) as (program, address):
        assert generate(address) == generate(address)
        all_ready(run_dir)
        listed = json.loads(subprocess.check_output([*PAGEWIRE, "ps", "--json", "--run-dir", str(run_dir)], timeout=60))
        assert sorted(service["role"] for service in listed) == ["admin", "frontend", "scheduler", "worker"]
        assert all(service["state"] and psutil.pid_exists(service["pid"]) for service in listed)
        admin = program.output.split("admin http://")[1].split(",")[0]
        eventually(lambda: get(admin, "/health")[0] == 200)
        states = ('status="waiting"', 'status="running"', 'status="failed"', 'state="free"', 'state="cached"', 'state="used"')
        wanted = ('status="finished"} 2.0', *states)  # of several services, each in its own time
        eventually(lambda: not [part for part in wanted if part not in get(admin, "/metrics")[1]])
        family = program.family()
        os.kill(program.pid, signal.SIGTERM)
        assert program.wait() == 0
        assert gone(family)
        assert left_in(run_dir) == []


def test_a_stream_gets_its_time_and_then_an_error_when_the_stack_is_told_to_end(run_dir: Path) -> None:
    slowly = ("--runner", "simulated", "--step-time", "0.05")  # minutes, if it were not ended
    with stack(run_dir, *slowly, "--shutdown-timeout", "0.5") as (program, address):
        connection = http.client.HTTPConnection(address, timeout=100)
        body = {"prompt": "long", "max_tokens": 4000, "ignore_eos": True, "stream": True, "temperature": 1}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith((b"data:", b"id:"))
        os.kill(program.pid, signal.SIGTERM)
        rest = response.read().decode()
        connection.close()
        assert "the server is shutting down" in rest
        assert rest.rstrip().endswith("data: [DONE]")
        assert program.wait() == 0


@pytest.mark.parametrize("delay", [0.3, 0.6, 1.0])
def test_a_stack_told_to_end_while_it_starts_ends(run_dir: Path, delay: float) -> None:
    with running([*PAGEWIRE, "up", *ORACLE, "--port", "0", "--admin-port", "0", "--run-dir", str(run_dir)]) as program:
        eventually(lambda: len(program.family()) > 1)  # from then on it hears signals
        time.sleep(delay)
        family = program.family()
        os.kill(program.pid, signal.SIGTERM)
        assert program.wait() == 0
        assert gone(family)
    assert left_in(run_dir) == []


def test_after_sigkill_of_up_nothing_is_left_within_six_seconds_even_of_stopped_services(run_dir: Path) -> None:
    with stack(run_dir) as (program, _):
        found = all_ready(run_dir)
        family = program.family()
        assert len(family) == 6
        os.kill(found["worker-0"].pid, signal.SIGSTOP)
        os.kill(program.pid, signal.SIGKILL)
        eventually(lambda: gone(family))  # nobody else would end a stopped one
    assert guardian.PATIENCE < 6 - 1
    with stack(run_dir) as (program, address):
        assert generate(address)
        os.kill(program.pid, signal.SIGTERM)
        program.wait()
    assert left_in(run_dir) == []


@pytest.mark.parametrize("name", ["worker-0", "scheduler-0", "frontend-0", "admin"])
def test_a_killed_service_comes_back_and_the_stack_answers_as_before(run_dir: Path, name: str) -> None:
    with stack(run_dir) as (program, address):
        before = generate(address)
        found = all_ready(run_dir)
        others = {n: r.pid for n, r in found.items() if n != name}
        victim = found[name].pid
        os.kill(victim, signal.SIGKILL)
        program.read_until(f"{name} (pid {victim}) was killed by SIGKILL; starting it again")
        eventually(lambda: get(address, "/ready")[0] == 200)  # a new frontend takes connections before it has a scheduler
        assert generate(address) == before
        found = all_ready(run_dir)
        assert found[name].pid != victim
        assert {n: r.pid for n, r in found.items() if n != name} == others


def test_frontends_share_the_port_and_workers_are_as_many_as_asked(run_dir: Path) -> None:
    with stack(run_dir, "--frontends", "2", "--workers", "2") as (_, address):
        found = all_ready(run_dir, 6)
        assert {"frontend-0", "frontend-1", "worker-0", "worker-1"} < set(found)
        os.kill(found["frontend-0"].pid, signal.SIGSTOP)
        # A stopped frontend may hold a connection that it took; a new one finds the other.
        assert eventually(lambda: get(address, "/health")[0] == 200)


def test_logs_are_objects_on_stderr_and_what_up_says_is_text_on_stdout(run_dir: Path, tmp_path: Path) -> None:
    up = [*PAGEWIRE, "up", *ORACLE, "--port", "0", "--admin-port", "0", "--run-dir", str(run_dir), "--log-format", "json"]
    logs = tmp_path / "stderr"
    with running(["sh", "-c", 'exec "$@" 2>"$0"', str(logs), *up, *UNHURRIED]) as program:
        address_of(program)
        all_ready(run_dir)
        os.kill(program.pid, signal.SIGTERM)
        assert program.wait() == 0
    assert [line.split()[0] for line in program.output.splitlines() if line.split()[0] != "listening"] == ["ready:", "summary"]
    assert {json.loads(line)["service"] for line in logs.read_text().splitlines()} == {"admin", "frontend-0", "scheduler-0", "worker-0"}


def test_a_second_up_is_refused_with_the_pid_of_the_first(run_dir: Path) -> None:
    with stack(run_dir) as (program, _), running([*PAGEWIRE, "up", *ORACLE, "--port", "0", "--run-dir", str(run_dir)]) as second:
        assert second.wait() != 0
        assert f"run directory {run_dir} is in use by process {program.pid}" in second.output


def test_a_taken_port_is_said_in_one_line(run_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running([*PAGEWIRE, "up", *ORACLE, "--port", str(port), "--run-dir", str(run_dir)]) as program:
            assert program.wait() != 0
            assert program.output.count("\n") == 1
            assert f"cannot listen on 127.0.0.1:{port}" in program.output


@pytest.mark.parametrize("host", ["999.1.1.1", "192.0.2.1", "a..b"])
def test_an_address_that_is_not_this_host_s_is_said_in_one_line(run_dir: Path, host: str) -> None:
    command = [*PAGEWIRE, "up", *ORACLE, "--host", host, "--no-auth", "--port", "0", "--run-dir", str(run_dir)]
    with running(command) as program:
        assert program.wait() != 0
        assert program.output.count("\n") == 1
        assert f"--host {host}: " in program.output


def test_a_model_that_is_not_there_ends_up_with_the_worker_s_line(run_dir: Path) -> None:
    with running([*PAGEWIRE, "serve", "/nowhere/model", "--port", "0", "--admin-port", "0", "--run-dir", str(run_dir)]) as program:
        assert program.wait() == 1
        assert "/nowhere/model" in program.output
        assert "worker-0 cannot run" in program.output
        assert "Traceback" not in program.output


def test_tap_shows_the_messages_of_a_running_stack_without_prompts(run_dir: Path) -> None:
    tap = [*PAGEWIRE, "tap", "scheduler-0", "--run-dir", str(run_dir)]
    with stack(run_dir) as (_, address), running(tap) as watching:

        def seen() -> bool:
            generate(address, "a secret prompt")
            watching.read_some(0.3)
            return all(kind in watching.output for kind in (" submit ", " plan ", " tokens "))

        eventually(seen)  # it may come in between two of a request's messages
        assert b"a secret prompt".hex() not in watching.output
        assert "secret" not in watching.output


def test_an_idle_stack_sleeps(run_dir: Path) -> None:
    with stack(run_dir) as (program, address):
        generate(address)
        all_ready(run_dir)
        family = program.family()
        for _ in range(6):  # at first it may still be settling
            before = {p.pid: p.cpu_times() for p in family}
            time.sleep(10)
            spent = {p.cmdline()[3]: sum(p.cpu_times()[:2]) - sum(before[p.pid][:2]) for p in family}
            if sum(spent.values()) < 0.2:  # 2% of a core: the goal is 1, the rest is room for busy neighbours
                return
        pytest.fail(f"seconds of CPU in ten: {spent}")


# ---------------------------------------------------------------- by hand


def by_hand(ports: tuple[int, int, int], run_dir: Path) -> dict[str, list[str]]:
    """The commands of the three services over TCP, each with a run directory of its own, as on three hosts."""
    http_port, frontends, workers = ports
    return {
        "frontend": ["frontend", "--port", str(http_port), "--scheduler", f"tcp://127.0.0.1:{frontends}", "--run-dir", str(run_dir / "f")],
        "scheduler": [
            *("scheduler", "--bind-frontends", f"tcp://127.0.0.1:{frontends}", "--bind-workers", f"tcp://127.0.0.1:{workers}"),
            *("--run-dir", str(run_dir / "s")),
        ],
        "worker": ["worker", *ORACLE, "--scheduler", f"tcp://127.0.0.1:{workers}", "--run-dir", str(run_dir / "w")],
    }


@pytest.mark.parametrize("order", list(itertools.permutations(("frontend", "scheduler", "worker"))), ids="-".join)
def test_services_started_by_hand_in_any_order_over_tcp_answer(run_dir: Path, order: tuple[str, ...]) -> None:
    ports = (free_port(), free_port(), free_port())
    commands = by_hand(ports, run_dir)
    with contextlib.ExitStack() as programs:
        started = {}
        for role in order:
            started[role] = programs.enter_context(running([*PAGEWIRE, *commands[role]]))
            started[role].read_until("started: pid")
        address = f"127.0.0.1:{ports[0]}"
        eventually(lambda: get(address, "/ready")[0] == 200)
        assert generate(address)
        for program in started.values():
            os.kill(program.pid, signal.SIGTERM)
        assert [program.wait() for program in started.values()] == [0, 0, 0]


@pytest.mark.parametrize(("role", "peers"), [("frontend", "a scheduler"), ("worker", "a scheduler"), ("scheduler", "a worker")])
def test_a_service_started_alone_says_once_that_it_waits(run_dir: Path, role: str, peers: str) -> None:
    arguments = {"frontend": ["--port", "0"], "worker": ORACLE, "scheduler": []}[role]
    with running([*PAGEWIRE, role, *arguments, "--run-dir", str(run_dir)]) as program:
        program.read_until(f"waiting for {peers}")
        time.sleep(3)  # in which it could say it again
        eventually(lambda: [(r.role, r.state) for r in services(run_dir).values()] == [(role, "waiting")])
        os.kill(program.pid, signal.SIGTERM)
        assert program.wait() == 0
        assert program.output.count("waiting for") == 1
    assert left_in(run_dir) == []


def test_honcho_starts_the_three_services_of_the_procfile(run_dir: Path) -> None:
    honcho = shutil.which("honcho", path=str(Path(sys.executable).parent))
    if honcho is None:
        pytest.skip("honcho is not installed")
    port = free_port()
    env = {
        "PAGEWIRE_RUN_DIR": str(run_dir),
        "PAGEWIRE_PORT": str(port),
        "PAGEWIRE_RUNNER": "oracle",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with running([honcho, "-f", str(ROOT / "procfile"), "start"], env=env) as program:
        eventually(lambda: get(f"127.0.0.1:{port}", "/ready")[0] == 200)
        assert generate(f"127.0.0.1:{port}")
        family = program.family()
        os.kill(program.pid, signal.SIGTERM)
        program.wait()
        eventually(lambda: gone(family))
    assert left_in(run_dir) == []


@pytest.mark.parametrize("arguments", [["--api-key-file", "/nowhere/keys"], ["--ssl-certfile", "/nowhere/cert.pem"]])
def test_files_that_no_frontend_could_use_are_refused_before_anything_starts(run_dir: Path, arguments: list[str]) -> None:
    with running([*PAGEWIRE, "up", *ORACLE, "--port", "0", "--admin-port", "0", "--run-dir", str(run_dir), *arguments]) as program:
        assert program.wait() == 2
        assert program.output.count("\n") == 1
        assert " ".join(arguments) in program.output
