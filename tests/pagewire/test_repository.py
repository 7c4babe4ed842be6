"""What holds for the whole checkout: its commands, its pins, and what must not be in it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("protocol", "frontend", "scheduler_svc", "gpu_worker", "pagewire")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TOPS = [path for path in ROOT.iterdir() if not path.name.startswith(".") or path.name == ".ci"]
ENDINGS = {".py", ".md", ".toml", ".txt", ".cu", ".svg", ".sh"}
TEXTS = sorted(
    path
    for top in TOPS
    for path in (top.rglob("*") if top.is_dir() else [top])
    if path.is_file() and (path.suffix in ENDINGS or path.name in ("Makefile", "procfile", "run"))
)
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "cloudpickle", "dill", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "recv_pyobj", "send_pyobj"}


def make(*arguments: str) -> str:
    """What make would run, the environment being set up."""
    # The tests may run under make themselves: its flags and level are not this one's.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", *arguments]
    return subprocess.check_output(command, cwd=ROOT, text=True, timeout=60, env=env)


def test_nothing_is_ever_unpickled_or_evaluated() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names: set[str] = set()
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names} & UNSAFE_MODULES
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]} & UNSAFE_MODULES
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id} & UNSAFE_CALLS
            elif isinstance(node, ast.Attribute):
                names = {node.attr} & {"recv_pyobj", "send_pyobj"}
            assert not names, f"{path.relative_to(ROOT)}:{node.lineno}: {names}"  # type: ignore[attr-defined]


def test_weights_are_never_loaded_by_torch_s_own_unpickler() -> None:
    for path in SOURCES:
        assert "torch.load" not in path.read_text(), path


def test_no_file_names_a_machine_s_paths_or_mirrors() -> None:
    private = re.compile(r"/(root|home/\w+|work)/|file://|(?<![\w.])pypi\.(?!org)[\w.-]+|index-url (?!https://download\.pytorch\.org)")
    for path in TEXTS:
        if path != Path(__file__):
            found = private.search(path.read_text(errors="replace"))
            assert found is None, f"{path.relative_to(ROOT)}: {found and found.group()}"


def test_everything_that_is_required_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split(",")
    required = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {normal(pin.split("==")[0]) for pin in pins}
    assert {normal(re.match(r"[\w.-]+", name).group()) for name in required} <= pinned  # type: ignore[union-attr]
    assert f"torch=={re.findall(r'^TORCH := (.*)$', (ROOT / 'Makefile').read_text(), re.M)[0]}" in pins


def test_the_services_extras_need_neither_torch_nor_transformers_but_for_the_worker() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("frontend", "scheduler"):
        assert not any(name.startswith(("torch", "transformers")) for name in extras[extra])


def test_make_serve_passes_its_variables_to_up() -> None:
    line = " ".join(make("serve", "PORT=1", "ADMIN_PORT=2", "RUN_DIR=/r", "DEVICE=cpu", "MODEL=/m", "WORKERS=3").split())
    assert "pagewire up --port 1 --admin-port 2 --device cpu --workers 3" in line
    assert '--run-dir "/r"' in line
    assert '--model "/m"' in line
    plain = " ".join(make("serve").split())
    assert "--port 8000 --admin-port 8001 --device auto --workers 1" in plain
    assert "--run-dir" not in plain
    assert "--model" not in plain


def test_make_test_lints_types_and_runs_every_test() -> None:
    commands = make("test")
    for wanted in ("ruff check", "ruff format --check", "mypy", "lint-imports", "python -m pytest", "-p tests.no_torch"):
        assert wanted in commands
    torch_free = re.findall(r"-p tests\.no_torch (.*)", commands)[0].split()
    assert all(f"--ignore={folder}" in commands for folder in torch_free)
    assert make("simulate", "SEEDS=7", "JOBS=1").split()[-4:] == ["--seeds", "7", "--jobs", "1"]
    assert make("soak", "MINUTES=2", "SEED=5").split()[-4:] == ["--minutes", "2", "--seed", "5"]


def test_ci_runs_the_readme_s_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    assert script.read_text().rstrip().endswith("exec make test")
    assert "\nmake test " in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_links_and_files_that_the_documents_name_exist(document: str) -> None:
    path = ROOT / document
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"`((?:protocol|frontend|scheduler_svc|gpu_worker|pagewire|tests|benchmarks|docs)/[\w/.-]*)`", text):
        assert (ROOT / name).exists(), name


def test_the_readme_names_only_flags_and_commands_that_exist() -> None:
    from click import Context

    from pagewire.cli import main

    text = (ROOT / "README.md").read_text()
    context = Context(main)
    commands = {name: main.get_command(context, name) for name in main.list_commands(context)}
    for name in re.findall(r"`?pagewire (\w+)", text):
        assert name in commands, name
    flags = {opt for command in commands.values() if command for param in command.params for opt in param.opts + param.secondary_opts}
    named = set(re.findall(r"(?<![\w-])(--[a-z][\w-]+)", text)) - {"--help"}
    assert named <= flags, named - flags
