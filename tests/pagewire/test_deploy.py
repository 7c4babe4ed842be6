"""The files in deploy/: units that systemd accepts, an image made of what exists, a configuration that services read."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from pagewire.cli import main

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
PROGRAM = "/opt/pagewire/bin/pagewire"


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    return parser


def test_there_is_a_unit_for_each_service() -> None:
    names = ["pagewire-admin", "pagewire-frontend@", "pagewire-scheduler", "pagewire-worker@"]
    assert [path.name for path in UNITS] == [f"{name}.service" for name in names]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_runs_its_service_as_a_user_of_its_own_and_restarts_what_may_be_mended_by_it(path: Path) -> None:
    service = unit(path)["Service"]
    command = service["ExecStart"].split()
    assert command[:2] == [PROGRAM, path.stem.removeprefix("pagewire-").removesuffix("@")]
    # every flag of the command line is one of the service's
    done = CliRunner().invoke(main, [*command[1:], "--help"])
    assert done.exit_code == 0
    assert all(word in done.output for word in command[2:] if word.startswith("--"))
    assert service["User"] == "pagewire"
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"].split() == ["2", "78"]
    assert "Environment=PAGEWIRE_RUN_DIR=/var/lib/pagewire " in path.read_text()
    assert (service["StateDirectory"], service["StateDirectoryMode"]) == ("pagewire", "0700")
    assert service["NoNewPrivileges"] == "yes"


@pytest.mark.parametrize("path", [path for path in UNITS if "@" in path.name], ids=lambda path: path.stem)
def test_an_instance_of_a_template_may_have_settings_of_its_own_which_go_first(path: Path) -> None:
    role = path.stem.removeprefix("pagewire-").removesuffix("@")
    files = re.findall(r"^EnvironmentFile=(.+)$", path.read_text(), re.M)
    assert files == [f"-/etc/pagewire/{role}.env", f"-/etc/pagewire/{role}-%i.env"], "of two that set a variable the later one counts"
    assert f"--name {role}-%i" in unit(path)["Service"]["ExecStart"]


def test_a_frontend_may_have_more_clients_than_the_soft_limit_of_open_files_that_systemd_sets() -> None:
    service = unit(DEPLOY / "systemd" / "pagewire-frontend@.service")["Service"]
    assert int(service["LimitNOFILE"]) > 1024


def test_a_worker_compiles_to_a_folder_that_it_may_write() -> None:
    service = (DEPLOY / "systemd" / "pagewire-worker@.service").read_text()
    assert "\nCacheDirectory=pagewire\n" in service
    folders = dict(re.findall(r"(PAGEWIRE_CACHE|TRITON_CACHE_DIR)=(\S+)", service))
    assert folders == {"PAGEWIRE_CACHE": "/var/cache/pagewire", "TRITON_CACHE_DIR": "/var/cache/pagewire/triton"}
    assert dict(re.findall(r"(PAGEWIRE_CACHE|TRITON_CACHE_DIR)=(\S+)", CONTAINERFILE)) == folders
    owned = re.search(r"install -d -o pagewire -g pagewire -m 0700 (.+)$", CONTAINERFILE, re.M)
    volumes = re.search(r"^VOLUME (.+)$", CONTAINERFILE, re.M)
    assert owned is not None
    assert volumes is not None
    assert owned[1].split() == volumes[1].split() == ["/run/pagewire", "/var/cache/pagewire"]


def test_the_manual_names_the_command_of_the_units_by_its_path() -> None:
    """sudo looks only into the system's own folders."""
    manual = (ROOT / "docs" / "operating.md").read_text()
    commands = re.findall(r"sudo (?:-u \w+ )?(\S*pagewire) ", manual)
    assert commands
    assert set(commands) == {PROGRAM}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units_and_calls_them_well_confined(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("pagewire")
    for path in UNITS:
        (tmp_path / path.name).write_text(path.read_text().replace(PROGRAM, str(program)))
    names = [str(tmp_path / path.name) for path in UNITS]
    verified = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, timeout=60, check=False)
    # it looks at the host's own units too; what concerns ours names them
    assert not [line for line in verified.stderr.splitlines() if "pagewire" in line], verified.stderr
    assert verified.returncode == 0, verified.stderr
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=30", *names]
    judged = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unrecognized option" not in judged.stderr:
        assert judged.returncode == 0, judged.stdout[-3000:]


@pytest.mark.parametrize("role", ["scheduler", "worker", "frontend", "admin"])
def test_every_service_reads_the_example_configuration(role: str) -> None:
    done = CliRunner().invoke(main, [role, "--config", str(DEPLOY / "pagewire.toml"), "--help"])
    assert done.exit_code == 0, done.output
    commented = re.sub(r"(?m)^# (\w+ = )", r"\1", (DEPLOY / "pagewire.toml").read_text())
    assert tomllib.loads(commented).keys() == {"frontend", "worker", "admin"}, "the lines in comments can be used as well"


def test_the_image_copies_what_exists_and_what_the_context_lets_through() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", CONTAINERFILE, re.M)
        for name in line.split()[:-1]  # the last is where to
    }
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {package.rstrip("*") for package in packages} <= copied


def test_the_image_has_the_pinned_torch_and_runs_as_nobody_special() -> None:
    pinned = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert pinned is not None
    assert f"ARG TORCH={pinned[1]}\n" in CONTAINERFILE
    last_stage = CONTAINERFILE.split("\nFROM ")[-1]
    user = re.search(r"^USER (\d+):(\d+)$", last_stage, re.M)
    assert user is not None, "a name could be root's"
    assert user[1] != "0"
    assert f"useradd --uid {user[1]} " in last_stage
    assert 'ENTRYPOINT ["pagewire"]' in last_stage
    extras = re.search(r"^ARG EXTRAS=(\S+)$", CONTAINERFILE, re.M)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras is not None
    assert set(extras[1].split(",")) <= known.keys()


@pytest.mark.parametrize(
    ("services", "healthy"),
    [(["ready"], True), (["ready", "ready", "ready"], True), (["ready", "loading"], False), (["waiting"], False), ([], False)],
)
def test_the_health_check_wants_every_service_of_the_container_ready(services: list[str], healthy: bool, tmp_path: Path) -> None:
    check = re.search(r"^    CMD pagewire ps \| (.+)$", CONTAINERFILE, re.M)
    assert check is not None
    listing = [f"worker  worker-{i}  {i + 9}  123  {state}" for i, state in enumerate(services)]
    text = "\n".join(["role  name  pid  incarnation  state", *listing] if listing else ["no service runs in /run/pagewire"])
    assert (subprocess.run(["sh", "-c", check[1]], input=text, text=True, timeout=60, check=False).returncode == 0) is healthy
