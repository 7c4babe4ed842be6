"""Commands find the stack that runs in their run directory."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pagewire.finding import ADMIN, API, admin_option, api_option, find_admin, find_api
from protocol.options import run_dir_option
from protocol.rundir import RunDir


@click.command()
@api_option
@admin_option
@run_dir_option
def where(url: str, admin: str, run_dir: Path) -> None:
    click.echo(find_api(url, run_dir))
    click.echo(find_admin(admin, run_dir))


def asked(*arguments: str) -> tuple[int, list[str]]:
    done = CliRunner().invoke(where, arguments, env={"PAGEWIRE_RUN_DIR": None, "PAGEWIRE_URL": None, "PAGEWIRE_ADMIN_URL": None})
    return done.exit_code, done.output.splitlines()


def test_it_is_what_the_services_say(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    frontend, admin = rundir.register("frontend", "frontend-0", 1), rundir.register("admin", "admin", 2)
    assert asked("--run-dir", str(tmp_path))[0] == 2, "they do not answer yet"
    frontend.serves("http://127.0.0.1:1234")
    frontend.state("ready")
    admin.serves("http://127.0.0.1:1235")
    assert asked("--run-dir", str(tmp_path)) == (0, ["http://127.0.0.1:1234", "http://127.0.0.1:1235"])
    assert asked("--run-dir", str(tmp_path), "--url", "http://x", "--admin", "http://y") == (0, ["http://x", "http://y"])
    frontend.remove()
    code, lines = asked("--run-dir", str(tmp_path))
    assert (code, lines) == (2, [f"Error: no frontend answers in {tmp_path}: is `pagewire up` running there?"])
    admin.remove()


def test_where_nothing_runs_it_is_the_default_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert asked() == (0, [API, ADMIN])
