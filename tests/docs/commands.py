"""The commands that README and docs/ print, and how each is run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("sh", "bash", "console", "shell")
OTHERS = ("text", "python", "toml", "json", "{toctree}")
FENCE = re.compile(r"(?ms)^( *)```([^\n]*)\n(.*?)^ *```$")

# What is not run here, and why. A reason that names a file under tests/ or .ci/ says where it is run.
NOT_RUN = {
    r"make test\b": "it is what runs this: .ci/run",
    r"make soak\b": "takes an hour: tests/faults/test_soak.py runs a short one",
    r"make simulate\b": "tests/simulation/test_simulation.py runs seeds",
    r"pip install 'pagewire\[": "asks the package index for a release",
    r"python3 -m venv .*|/tmp/fresh/bin/pip": "installs everything once more: make does it in a fresh checkout",
    r"python -m pytest (?P<path>\S+)": "part of make test: .ci/run",
    r"python examples/offline\.py|python examples/async_client\.py": "tests/examples/test_clients.py",
    r"python examples/simple_vllm/(server|client|benchmark)\.py": "tests/examples/test_simple_vllm.py",
    r"python -m benchmarks\.gpu_\w+": "needs an NVIDIA card",
    r"python -m benchmarks\.\w+": "takes minutes",
    r"make serve .*DEVICE=cuda": "needs an NVIDIA card",
    r"sudo ": "needs systemd and root: tests/pagewire/test_deploy.py checks the files",
    r"docker ": "needs a container engine: tests/pagewire/test_deploy.py checks the file",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands, without comments; a command may go over several lines."""

    page: str
    commands: tuple[str, ...]

    def without(self, left_out: Callable[[str], object]) -> Block:
        """The same without some commands, and without its page: equal blocks of two pages are one."""
        return Block("", tuple(command for command in self.commands if not left_out(command)))

    def __str__(self) -> str:
        return f"{self.page} {self.commands[0][:60]}".strip()


def blocks() -> list[Block]:
    """All of them, in the order of the pages."""
    found = []
    for path in PAGES:
        for space, language, text in FENCE.findall(path.read_text()):
            if language.split(" ")[0] in SHELL:
                found.append(Block(str(path.relative_to(ROOT)), commands(re.sub(rf"(?m)^{space}", "", text))))
    return found


def commands(text: str) -> tuple[str, ...]:
    """The commands of a block: lines, those that end in a backslash joined with the next; prompts and comments removed."""
    lines = [re.sub(r"^\$ |(^|\s{2,})#.*$", "", line).rstrip() for line in text.replace("\\\n", "\x00").splitlines()]
    return tuple(line.replace("\x00", "\\\n") for line in lines if line)


def reason(command: str) -> str:
    """Why a command is not run; empty if it is."""
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command)), "")


def starts_a_stack(command: str) -> bool:
    """Whether a command starts everything and goes on until it is told to end."""
    return bool(re.match(r"make serve\b|pagewire (up|serve)\b", command))


def are_services(block: Block) -> bool:
    """Whether a block is of services, each for a terminal of its own, that make a stack together."""
    return all(re.match(r"(pagewire (frontend|scheduler|worker|admin)|honcho -f)\b", command) for command in block.commands)
