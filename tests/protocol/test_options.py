"""Flags, environment, file, default: in that order, and nothing ignored in silence."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from frontend.settings import FrontendSettings
from gpu_worker.settings import WorkerSettings
from protocol.files import RunDirError
from protocol.flags import FLAGS
from protocol.options import service_command, settings_fields
from protocol.service import EXIT_REFUSED, CannotRun
from protocol.times import Times
from scheduler_svc.settings import SchedulerSettings


@dataclass(frozen=True)
class Sample:
    """Settings of every kind."""

    run_dir: Path
    name: str = "worker-0"
    schedulers: tuple[str, ...] = ()
    model: str = ""
    device: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    times: Times = field(default_factory=Times)


def invoke(*arguments: str, env: dict[str, str] | None = None, error: Exception | None = None) -> tuple[Result, Any]:
    seen: list[Any] = []

    def run(settings: Any) -> None:
        seen.append(settings)
        if error is not None:
            raise error

    command = service_command("worker", Sample, lambda: run, "A sample.")
    result = CliRunner().invoke(command, ["--run-dir", "/somewhere", *arguments], env=env)
    return result, seen[0] if seen else None


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        (tmp_path / "c.toml").write_text(text)
        return str(tmp_path / "c.toml")

    return write


def test_defaults_are_the_settings_own() -> None:
    assert invoke()[1] == Sample(Path("/somewhere"))


def test_flags_go_before_environment_before_file_before_defaults(config: Any) -> None:
    file = config('max_num_seqs = 3\nmodel = "from file"\ngpu-memory-utilization = 0.5\n')
    env = {"PAGEWIRE_MAX_NUM_SEQS": "2", "PAGEWIRE_MODEL": "from environment", "PAGEWIRE_CONFIG": file}
    settings = invoke("--max-num-seqs", "1", env=env)[1]
    assert (settings.max_num_seqs, settings.model, settings.gpu_memory_utilization) == (1, "from environment", 0.5)
    assert settings.enable_prefix_caching is True


def test_a_role_s_own_environment_and_table_go_before_what_all_services_share(config: Any) -> None:
    file = config('max_num_seqs = 3\nmodel = "shared"\n[worker]\nmax_num_seqs = 4\n[frontend]\nport = 5\n')
    settings = invoke("--config", file)[1]
    assert (settings.max_num_seqs, settings.model) == (4, "shared")
    settings = invoke("--config", file, env={"PAGEWIRE_WORKER_MAX_NUM_SEQS": "6", "PAGEWIRE_MAX_NUM_SEQS": "7"})[1]
    assert settings.max_num_seqs == 6


def test_names_and_endpoints_are_not_taken_from_what_all_services_share() -> None:
    env = {"PAGEWIRE_NAME": "shared", "PAGEWIRE_SCHEDULERS": "tcp://127.0.0.1:1"}
    settings = invoke(env=env)[1]
    assert (settings.name, settings.schedulers) == ("worker-0", ())
    settings = invoke(env={"PAGEWIRE_WORKER_NAME": "mine", "PAGEWIRE_WORKER_SCHEDULERS": "tcp://a:1 tcp://b:2"})[1]
    assert (settings.name, settings.schedulers) == ("mine", ("tcp://a:1", "tcp://b:2"))


def test_flags_of_every_kind_are_read() -> None:
    settings = invoke(
        *("--scheduler", "tcp://a:1", "--scheduler", "tcp://b:2", "--no-enable-prefix-caching"),
        *("--times-factor", "0.5", "--gpu-memory-utilization", "0.25", "--device", "cpu"),
    )[1]
    assert settings.schedulers == ("tcp://a:1", "tcp://b:2")
    assert settings.enable_prefix_caching is False
    assert settings.times == Times().scaled(0.5)
    assert (settings.gpu_memory_utilization, settings.device) == (0.25, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-num-seqs", "0"], "'--max-num-seqs': 0 is not in the range"),
        (["--max-num-seqs", "many"], "'many' is not a valid integer"),
        (["--gpu-memory-utilization", "1.5"], "'--gpu-memory-utilization': 1.5 is not in the range"),
        (["--device", "tpu"], "'tpu' is not one of"),
        (["--prot", "1"], "No such option"),
        (["--tensor-parallel-size", "2"], "1 is the only size supported"),
        (["--pipeline-parallel-size", "0"], "1 is the only size supported"),
        (["--config", "/nowhere.toml"], "does not exist"),
    ],
)
def test_a_bad_flag_is_named(arguments: list[str], message: str) -> None:
    result, settings = invoke(*arguments)
    assert settings is None
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("name", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_the_only_size_is_a_setting_like_any_other(config: Any, name: str) -> None:
    for size, code in (("1", 0), ("2", 2)):
        for arguments, env in (((), {f"PAGEWIRE_{name.upper()}": size}), (("--config", config(f"{name} = {size}\n")), None)):
            result, settings = invoke(*arguments, env=env)
            assert result.exit_code == code
            assert (settings is None) == ("1 is the only size supported, not 2" in result.output) == (code == 2)


@pytest.mark.parametrize("flag", ["--trust-remote-code", "--worker-use-ray"])
def test_what_is_never_done_is_refused_in_one_line(flag: str) -> None:
    result, settings = invoke(flag)
    assert settings is None
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert f"{flag} is not supported" in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_nmu_seqs = 3\n", "nothing has a setting 'max_nmu_seqs'"),
        ("[worker]\nport = 3\n", "worker has no setting 'port'"),
        ("[gpu]\nseqs = 3\n", "there is no table [gpu]"),
        ("max_num_seqs = \n", "c.toml"),
        ("max_num_seqs = 0\n", "0 is not in the range"),
        ('max_num_seqs = "x"\n', "'x' is not a valid integer"),
    ],
)
def test_a_bad_file_is_named(config: Any, text: str, message: str) -> None:
    result, settings = invoke("--config", config(text))
    assert settings is None
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_setting_of_another_service_at_the_top_of_the_file_is_left_to_it(config: Any) -> None:
    assert invoke("--config", config("port = 9000\n"))[1] == Sample(Path("/somewhere"))


@pytest.mark.parametrize("error", [CannotRun("no such model"), RunDirError("in use")])
def test_what_the_user_must_mend_is_one_line_and_a_code_of_its_own(error: Exception) -> None:
    result, _ = invoke(error=error)
    assert result.exit_code == EXIT_REFUSED
    assert result.output == f"pagewire: {error}\n"


def test_a_library_that_is_not_installed_is_named_with_the_extra_that_brings_it() -> None:
    def load() -> Any:
        raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")

    result = CliRunner().invoke(service_command("frontend", Sample, load, ""), ["--run-dir", "/somewhere"])
    assert result.exit_code == EXIT_REFUSED
    assert result.output == "pagewire: uvicorn is not installed: pip install 'pagewire[frontend]'\n"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_crash_before_the_service_has_a_log_is_in_its_log_in_the_form_that_was_asked_for(tmp_path: Path, form: str) -> None:
    program = (
        "from protocol.options import service_command\n"
        "from scheduler_svc.settings import SchedulerSettings\n"
        "def load(): raise RuntimeError('a library is broken')\n"
        "service_command('scheduler', SchedulerSettings, load, '')()\n"
    )
    arguments = ["--run-dir", str(tmp_path), "--name", "early", "--log-format", form]
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    log = (tmp_path / "logs" / "early.log").read_text()
    assert ended.stderr == log
    if form == "json":
        [line] = map(json.loads, log.splitlines())
        assert (line["service"], line["level"]) == ("early", "CRITICAL")
        log = f"{line['message']}\n{line['exception']}"
    assert "died of RuntimeError before it had started" in log
    assert "RuntimeError: a library is broken" in log


def test_help_shows_defaults_and_units() -> None:
    text = " ".join(invoke("--help")[0].output.split())
    assert "Sequences that run at once. [default: 256;" in text
    assert "--times-factor" not in text


@pytest.mark.parametrize("settings", [FrontendSettings, SchedulerSettings, WorkerSettings])
def test_every_setting_has_a_description_and_can_be_set(settings: type) -> None:
    for setting in settings_fields(settings):
        assert FLAGS[setting.name].help.endswith((".", ").")), setting.name
    command = service_command("worker", settings, lambda: lambda given: None, "")
    assert {p.name for p in command.params} >= {setting.name for setting in settings_fields(settings)}
    assert CliRunner().invoke(command, ["--run-dir", "/somewhere"]).exit_code == 0


def test_no_description_is_left_over() -> None:
    from pagewire.admin import AdminSettings
    from pagewire.up import up_fields

    used = {f.name for s in (FrontendSettings, SchedulerSettings, WorkerSettings, AdminSettings) for f in settings_fields(s)}
    assert set(FLAGS) == used | {f.name for f in up_fields()}
