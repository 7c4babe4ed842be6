"""The reference pages have every command, flag, message, field and metric that the code has, and the pages build without a broken link."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType

import click
import httpx
import pytest

from frontend.api.openapi import description
from pagewire.cli import main
from protocol import messages
from tests.e2e.stack import eventually, stack

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SERVICES = ("protocol", "frontend", "scheduler_svc", "gpu_worker")


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> typing.Callable[[str], ModuleType]:
    """Imports a module of docs/generate, which is a program and no package."""
    monkeypatch.syspath_prepend(str(DOCS / "generate"))
    return importlib.import_module


def build(source: Path, to: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", str(source), str(to)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pages_build_and_a_broken_link_or_anchor_fails(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    shutil.copytree(DOCS, source)
    done = build(source, tmp_path / "html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "reference" / "protocol.html").stat().st_size > 10_000
    page = source / "quickstart.md"
    text = page.read_text()
    for target in ("nowhere.md", "guide.md#nowhere"):
        page.write_text(f"{text}\n[a link]({target})\n")
        done = build(source, tmp_path / "html")
        assert done.returncode != 0
        assert "nowhere" in done.stderr


def test_links_of_the_files_outside_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        text = path.read_text()
        links = re.findall(r"\]\(([^)\s]+)\)", text)
        for link in links:
            target, _, anchor = link.partition("#")
            if "://" in target:
                continue
            assert (path.parent / target).exists(), f"{path.name}: {link}"
            if anchor:
                headings = re.findall(r"(?m)^#+ (.+)$", (path.parent / target).read_text())
                slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in slugs, f"{path.name}: {link}"


def test_every_command_and_flag_is_there(generate: typing.Callable[[str], ModuleType]) -> None:
    page: str = generate("command_pages").commands_page()
    sections = dict(re.findall(r"(?ms)^## (pagewire [\w ]+)\n(.*?)(?=^## |\Z)", page))

    def look(group: click.Group, context: click.Context, before: str) -> int:
        count = 0
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            if isinstance(command, click.Group):
                count += look(command, context, f"{before} {name}")
                continue
            section = sections[f"{before} {name}"]
            count += 1
            for param in command.params:
                if isinstance(param, click.Option) and not param.hidden and name != "serve":
                    assert all(opt in section for opt in param.opts), (name, param.opts)
                    assert (param.help or "") in section or "[default" in (param.help or "")
        return count

    assert look(main, click.Context(main), "pagewire") == len(sections) >= 18


def test_every_field_of_the_api_has_a_text(generate: typing.Callable[[str], ModuleType]) -> None:
    texts = generate("api_page").FIELDS
    schemas = description()["components"]["schemas"]
    fields = {field for name, schema in schemas.items() if name != "Error" for field in schema["properties"]}
    assert fields - texts.keys() == set(), "write into docs/generate/api_page.py what these mean"
    assert texts.keys() - fields == set(), "the API has these no more"
    narrower = generate("api_page").NARROWER
    assert all(narrower[body].keys() <= schemas[body]["properties"].keys() for body in narrower)
    page: str = generate("api_page").api_page()
    assert all(f"`{path}`" in page for path in ("POST /v1/completions", "GET /v1/models", "POST /tokenize"))


def test_every_message_and_field_is_there(generate: typing.Callable[[str], ModuleType]) -> None:
    page: str = generate("message_page").messages_page()
    sections = dict(re.findall(r"(?ms)^### (\w+)\n(.*?)(?=^##|\Z)", page))
    kinds = [
        *typing.get_args(messages.Any),
        messages.SamplingParams,
        messages.Choice,
        messages.Admit,
        messages.Geometry,
        messages.ModelInfo,
    ]
    assert len(kinds) > 25
    for kind in kinds:
        fields = re.findall(r"(?m)^\| (\d+) \| `(\w+)`", sections[kind.__name__])
        assert [name for _, name in fields] == list(kind.__struct_fields__)


def events_of_the_code() -> set[str]:
    """Names that the services count events by, as patterns: where a part of a name is computed, anything fits."""
    found = set()
    for package in SERVICES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add" and node.args):
                    continue
                if not re.search("counters|connections", ast.unparse(node.func.value)):
                    continue
                named = [node.args[0]]
                if isinstance(node.args[0], ast.IfExp):
                    named = [node.args[0].body, node.args[0].orelse]
                for name in named:
                    if isinstance(name, ast.JoinedStr):
                        found.add("".join(str(part.value) if isinstance(part, ast.Constant) else r"\w+" for part in name.values))
                    elif isinstance(name, ast.Constant):
                        found.add(str(name.value))
    return found


def test_every_counted_event_has_a_text(generate: typing.Callable[[str], ModuleType]) -> None:
    texts = generate("figure_texts").EVENTS
    events = events_of_the_code()
    assert len(events) > 30
    without = {event for event in events if not any(re.fullmatch(event, text) for text in texts)}
    assert without == set(), "write into docs/generate/figure_texts.py what these mean"
    assert {text for text in texts if not any(re.fullmatch(event, text) for event in events)} == set(), "nobody counts these any more"


@pytest.mark.slow
def test_every_metric_of_a_running_stack_is_there(generate: typing.Callable[[str], ModuleType]) -> None:
    page: str = generate("metric_page").metrics_page()
    events = generate("figure_texts").EVENTS
    with stack() as running:
        running.up("--runner", "oracle")
        body = {"prompt": "a prompt of several blocks, " * 4, "max_tokens": 20, "stream": True}
        assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).status_code == 200
        assert httpx.get(f"{running.url}/nowhere", timeout=60).status_code == 404

        def scrape() -> str:
            text = httpx.get(f"{running.admin}/metrics", timeout=60).text
            return text if "pagewire_worker_steps" in text and "pagewire_scheduler_blocks_taken" in text else ""

        text: str = eventually(scrape)
    shown = {name for name, _ in re.findall(r"(?m)^# TYPE (\S+) (\S+)$", text)}
    assert len(shown) > 40
    for name in sorted(shown):
        event = re.sub("^pagewire_(frontend|scheduler|worker)_", "", name)
        known = f"`{name}`" in page or {event, event.removeprefix("wire_")} & events.keys()
        assert known, f"{name} is not described: docs/generate/figure_texts.py"
