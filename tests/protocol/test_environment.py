"""A variable that looks like a setting and is none is said, once, by name."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pagewire.admin import AdminSettings
from pagewire.up import service_settings, up_fields
from protocol.environment import OTHERS, known_variables, unknown_variables
from protocol.flags import UP
from protocol.options import options, settings_fields
from tests.e2e.stack import stack

ROOT = Path(__file__).parents[2]
PACKAGES = ("frontend", "scheduler_svc", "gpu_worker", "pagewire", "protocol")


def test_every_variable_that_the_code_names_is_known() -> None:
    sources = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    named = {name for text in sources for name in re.findall(r"PAGEWIRE_([A-Z_]+[A-Z])", text)}
    assert len(named) > 10
    assert named <= known_variables()


def test_a_misspelt_one_is_named_with_the_nearest() -> None:
    [line] = unknown_variables(["HOME", "PAGEWIRE_MAX_NUM_SEQ", "PAGEWIRE_PORT", "PAGEWIRE_WORKER_DEVICE"])
    assert "PAGEWIRE_MAX_NUM_SEQ is no setting" in line
    assert line.endswith("did you mean PAGEWIRE_MAX_NUM_SEQS?")
    assert unknown_variables(["PAGEWIRE_QQQQ"]) == ["the environment's PAGEWIRE_QQQQ is no setting and is ignored"]
    assert "PAGEWIRE_WORKER_NAME" in unknown_variables(["PAGEWIRE_WORKR_NAME"])[0]


def test_those_that_are_known_are_those_that_a_command_reads() -> None:
    fields = {role: settings_fields(settings) for role, settings in {**service_settings(), "admin": AdminSettings}.items()}
    params = [param for role in fields for param in options(role, fields[role])] + options(UP, up_fields())
    named = [[param.envvar] if isinstance(param.envvar, str) else param.envvar or [] for param in params]
    read = {variable.removeprefix("PAGEWIRE_") for variables in named for variable in variables}
    assert read - set(OTHERS) == known_variables() - set(OTHERS)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SCHEDULER", "PAGEWIRE_FRONTEND_SCHEDULERS or PAGEWIRE_WORKER_SCHEDULERS"),
        ("WORKER_PORT", "PAGEWIRE_PORT"),
        ("ADMIN_MAX_NUM_SEQS", "PAGEWIRE_MAX_NUM_SEQS"),
        ("WORKER_RUN_DIR", "PAGEWIRE_RUN_DIR"),
        ("API", "PAGEWIRE_ADMIN_API"),
        ("ADMIN_URI", "PAGEWIRE_ADMIN_URL"),
    ],
)
def test_one_that_lacks_its_role_or_names_another_s_is_none_either(name: str, meant: str) -> None:
    [line] = unknown_variables([f"PAGEWIRE_{name}"])
    assert line == f"the environment's PAGEWIRE_{name} is no setting and is ignored; did you mean {meant}?"


def test_commands_say_so_and_do_not_tell_its_value(tmp_path: Path) -> None:
    env = {"PATH": "/bin:/usr/bin", "PAGEWIRE_RUN_DIR": str(tmp_path / "x"), "PAGEWIRE_RUNNR": "secret"}
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["pagewire"]
    module, _, function = script.partition(":")
    program = [sys.executable, "-c", f"import sys, {module} as module; sys.argv = ['pagewire', 'ps']; module.{function}()"]
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (
        done.stderr.splitlines()[0]
        == "pagewire: the environment's PAGEWIRE_RUNNR is no setting and is ignored; did you mean PAGEWIRE_RUNNER?"
    )
    assert "secret" not in done.stdout + done.stderr


@pytest.mark.slow
def test_up_says_it_once_for_all_its_services() -> None:
    with stack() as made:
        up = made.up("--runner", "oracle", env={"PAGEWIRE_MAX_NUM_SEQ": "9", "PAGEWIRE_WORKER_MAX_NUM_SEQS": "9"})
        assert up.output().count("is no setting") == 1
        assert up.output().count("PAGEWIRE_MAX_NUM_SEQ ") == 1
