"""Every command that the README and docs/ print is run as it is printed, or stands in a list with the reason why not.

What is replaced: ports (by free ones, through the settings' environment), addresses of other hosts (by this one's), and
/models (by a tiny model). `pagewire top` prints one picture, and `pagewire chat` is asked through a pipe and answers briefly.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import httpx
import pytest

from pagewire.cli import main
from protocol.rundir import RunDir
from tests.docs.commands import FENCE, NOT_RUN, OTHERS, PAGES, ROOT, SHELL, Block, are_services, blocks, reason, starts_a_stack
from tests.e2e.stack import Process, Stack, eventually, stack
from tests.pagewire.processes import free_port

BLOCKS = blocks()
COMMANDS = list(dict.fromkeys(command for block in BLOCKS for command in block.commands))  # each once
SERVICES = [block for block in BLOCKS if are_services(block)]
RUN = list(dict.fromkeys(ours for block in BLOCKS if not are_services(block) if (ours := block.without(reason)).commands))
STARTS = [block.commands[0] for block in RUN if starts_a_stack(block.commands[0])]
FLEET = [block for block in RUN if re.match(r"pagewire (roll|drain|start)\b", block.commands[0])]
ASKED = [block for block in RUN if block not in FLEET and not starts_a_stack(block.commands[0])]  # in the order of the pages
THE_STACK = "make serve"  # runs while these are asked
SAID = {"capital of France": "Paris", "/v1/models": "SmolLM2", "(?m)^pagewire ps$": "scheduler-0", "(?m)^pagewire top": "worker-0"}
AS_PRINTED_BUT = {"^pagewire top$": "pagewire top --once", "^pagewire chat\\b": "pagewire chat --max-tokens 16"}
TYPED = "Name a colour.\n/quit\n"


# ---------------------------------------------------------------- what there is


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_hides_from_this_test(page: Path) -> None:
    text = page.read_text()
    for _, language, _ in FENCE.findall(text):
        assert language.split(" ")[0] in (*SHELL, *OTHERS), f"a fence of language {language!r}"
    outside = FENCE.sub("", text)
    hidden = re.findall(r"(?m)^(?: {4,}|\t)((?:pagewire|python3?|curl|pip|sudo|docker|honcho|\.ci/run) .*)$", outside)
    assert not hidden, "commands belong in a fenced block of sh"
    for command in re.findall(r"(?m)`(pagewire [a-z][^`]*)`", outside):
        check_ours(command.replace("…", ""))


def test_there_is_something_to_run_and_each_reason_not_to_is_needed() -> None:
    assert THE_STACK in STARTS
    assert len(ASKED) > 10
    assert len(SERVICES) >= 4
    assert FLEET
    needed = {pattern for pattern in NOT_RUN if any(re.match(pattern, command) for command in COMMANDS)}
    always = {r"make soak\b", r"python -m benchmarks\.gpu_\w+"}  # of pages that come and go
    assert NOT_RUN.keys() - needed <= always


@pytest.mark.parametrize("command", [command for command in COMMANDS if reason(command)])
def test_what_is_not_run_exists(command: str) -> None:
    for path in re.findall(r"(?:tests|\.ci)/[\w/.]+", reason(command)):
        assert (ROOT / path).exists()
    for word in command.split():
        if re.match(r"(tests|examples|benchmarks|deploy|docs)/", word) and "*" not in word:
            assert (ROOT / word).exists(), word
    if module := re.match(r"python -m (benchmarks\.\w+)(.*)", command):
        up = main.get_command(click.Context(main), "up")
        assert up is not None
        source = (ROOT / (module[1].replace(".", "/") + ".py")).read_text()
        for flag in re.findall(r" (--[\w-]+)", module[2]):
            passed_on = any(flag in param.opts for param in up.params)  # some start a stack with flags of its own
            assert f'"{flag}"' in source or passed_on, f"{module[1]} has no {flag}"
    if command.startswith("pagewire "):
        check_ours(command)


def check_ours(command: str) -> None:
    """Assert that `pagewire WORD …` names a command, and that its flags are that command's."""
    words = re.split(r"[\s|,]+", command)[1:]
    group: click.Command | None = main
    context = click.Context(main)
    while isinstance(group, click.Group) and words and not words[0].startswith("-") and words[0].isalpha():
        group = group.get_command(context, words.pop(0))
        assert group is not None, f"there is no {command!r}"
    known = {opt for param in group.params for opt in (*param.opts, *param.secondary_opts)} if group else set()
    for word in words:
        flag = re.match(r"--[a-z][\w-]*", word)
        assert not flag or flag[0] in known | {"--help", "--version"}, f"{command!r} has no {word}"


# ---------------------------------------------------------------- where it runs


@dataclass
class Place:
    """A checkout to run in: this one's files, under a shell that finds its environment."""

    folder: Path
    env: dict[str, str]
    stack: Stack

    def shell(self, command: str, timeout: float = 240.0, typed: str = "") -> str:
        """What a command prints. Asserts that it succeeds."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.env,
            input=typed,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{command}\nended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, command: str, **env: str) -> Process:
        """Start a command that goes on."""
        return self.stack.program(["bash", "-c", f"exec {command}"], {**self.env, **env}, self.folder)

    def all_ready(self, roles: list[str]) -> None:
        """Wait until the services of these roles are ready, and so many: `up` is as soon as a request would be answered."""

        def ready() -> bool:
            records = RunDir(self.stack.run_dir).services()
            return sorted(record.role for record in records if record.role in roles and record.state == "ready") == sorted(roles)

        eventually(ready)

    def end(self, process: Process) -> None:
        """Ctrl-C, and an orderly end. make itself, having waited, ends as one that was interrupted."""
        self.all_ready(["admin"])  # it is who sums up
        os.killpg(process.popen.pid, signal.SIGINT)
        assert process.popen.wait(100) in (0, -signal.SIGINT), process.output()
        assert "summary {" in process.output(), process.output()


@contextlib.contextmanager
def place(**env: str) -> Iterator[Place]:
    """A folder that looks like a fresh checkout that has been set up."""
    with stack() as made:
        folder = made.folder / "checkout"
        folder.mkdir()
        for path in ROOT.iterdir():
            if path.name not in (".venv", ".git", "build"):
                (folder / path.name).symlink_to(path)
        (folder / ".venv").symlink_to(sys.prefix)
        bin = made.folder / "bin"
        bin.mkdir()
        # the environment is set up, whatever the times of its files say
        (bin / "make").write_text(f'#!/bin/sh\nexec {shutil.which("make")} -o .venv/.installed "$@"\n')
        (bin / "make").chmod(0o755)
        (bin / "python").symlink_to(sys.executable)
        clean = {name: value for name, value in os.environ.items() if not re.match("PAGEWIRE_|MAKE|MFLAGS|OPENAI_", name)}
        settings = {"PORT": "0", "ADMIN_PORT": "0", "PAGEWIRE_PORT": "0", "PAGEWIRE_ADMIN_PORT": "0", "JOBS": "1"}
        settings["PAGEWIRE_SHUTDOWN_TIMEOUT"] = "600"  # nobody is killed before it has summed up
        where = {"PATH": f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PAGEWIRE_RUN_DIR": str(made.run_dir)}
        yield Place(folder, {**clean, **settings, **where, **env}, made)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every model that the pages name is a tiny one."""
    folder = tmp_path_factory.mktemp("models")
    script = (
        "import sys, test_simple_engine as t\n"
        "model = t.tiny_llama(); model.config.max_position_embeddings = 8192\n"
        "model.save_pretrained(sys.argv[1]); t.byte_tokenizer().save_pretrained(sys.argv[1])"
    )
    command = [sys.executable, "-c", script, str(folder / "tiny")]
    subprocess.run(command, cwd=ROOT / "examples" / "simple_vllm", check=True, capture_output=True, timeout=100)
    for name in {name for command in COMMANDS for name in re.findall(r"/models/([\w.-]+)", command)}:
        (folder / name).symlink_to(folder / "tiny")
    return folder


# ---------------------------------------------------------------- running


@pytest.fixture(scope="module")
def served() -> Iterator[Place]:
    """A stack that runs, started by the first command of the quick start."""
    with place() as here:
        process = here.start(THE_STACK)
        ready = process.line(r"ready: (http://\S+) \(admin (http://[^ ,)]+)", 120)
        here.all_ready(["admin", "frontend", "scheduler", "worker"])
        here.stack.url, here.stack.admin = ready[1], ready[2]
        yield here
        here.end(process)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(300)
@pytest.mark.skipif(not shutil.which("curl") and os.environ.get("CI") != "true", reason="curl is not installed")
@pytest.mark.parametrize("block", ASKED, ids=str)
def test_a_block_runs_as_printed(block: Block, served: Place, models: Path) -> None:
    command = "\n".join(("set -e", *block.commands))
    places = {"http://127.0.0.1:8000": served.stack.url, "http://127.0.0.1:8001": served.stack.admin, "/models/": f"{models}/"}
    for there, here in places.items():
        command = command.replace(there, here)
    for pattern, instead in AS_PRINTED_BUT.items():
        command = re.sub(f"(?m){pattern}", instead, command)
    printed = served.shell(command, typed=TYPED)
    for part, answer in SAID.items():
        assert not re.search(part, command) or answer in printed, printed[:3000]
    assert '{"error"' not in printed, printed[:3000]


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", sorted(set(STARTS) - {THE_STACK}))
def test_a_stack_starts_as_printed_and_ends_at_ctrl_c(command: str, models: Path) -> None:
    # the packaged model is `make serve`'s
    settings = {} if "/models/" in command else {"PAGEWIRE_RUNNER": "oracle"}
    with place(PAGEWIRE_DEVICE="cpu", DEVICE="cpu", PAGEWIRE_THREADS="1", **settings) as here:
        process = here.start(command.replace("/models/", f"{models}/"))
        process.line(r"ready: http://\S+", 120)
        here.end(process)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", SERVICES, ids=str)
def test_services_by_hand_find_one_another(block: Block) -> None:
    port, admin, endpoints = free_port(), free_port(), {"7001": str(free_port()), "7002": str(free_port())}
    settings = {"PAGEWIRE_FRONTEND_PORT": str(port), "PAGEWIRE_ADMIN_PORT": str(admin), "PAGEWIRE_RUNNER": "oracle"}
    with place(**settings) as here:
        if "--key-file" in "".join(block.commands):  # made by the page's command before, and carried to each host
            here.shell(next(command for command in COMMANDS if command.startswith("pagewire keys ")))
            here.shell("cp keys/*.key keys/*.pub .")
        started = []
        for command in block.commands:
            local = re.sub(r"tcp://10\.0\.0\.\d+:(\d+)", lambda found: f"tcp://127.0.0.1:{endpoints[found[1]]}", command)
            started.append(here.start(re.sub(r"--port \d+", f"--port {port}", local).replace("127.0.0.1:8000", f"127.0.0.1:{port}")))
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200:
                    break
            assert time.monotonic() < deadline, "\n".join(process.output() for process in started)
            assert all(process.popen.poll() is None for process in started), "\n".join(process.output() for process in started)
            time.sleep(0.1)
        body = {"prompt": "x", "max_tokens": 3, "ignore_eos": True}
        assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_services_are_rolled_and_drained_as_printed() -> None:
    with place(PAGEWIRE_RUNNER="oracle", PAGEWIRE_WORKERS="2") as here:
        process = here.start("pagewire up")
        process.line(r"ready: http://\S+", 120)
        here.all_ready(["admin", "frontend", "scheduler", "worker", "worker"])
        for block in sorted(FLEET, key=lambda block: "roll" in block.commands[0]):  # which gives new names
            here.shell("\n".join(("set -e", *block.commands)))
            for drained in re.findall(r"pagewire drain (\S+)", "\n".join(block.commands)):
                assert drained not in here.shell("pagewire ps")
        here.end(process)
