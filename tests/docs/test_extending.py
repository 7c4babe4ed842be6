"""The walk-throughs of docs/extending are true to the code: what they name exists, and what they build works."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import scheduler_svc.engine

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "extending").glob("*.md"))
FOLDERS = ("protocol", "frontend", "scheduler_svc", "gpu_worker", "pagewire", "tests", "benchmarks", "docs")
SOURCES = {path: path.read_text() for top in FOLDERS[:-1] for path in (ROOT / top).rglob("*.py")}
INVENTED = {"MyAttention", "shortest", "embedding_multiplier"}  # by the walk-throughs themselves


def python_blocks(page: str) -> list[str]:
    """The Python of a page, without the indentation of the list it stands in."""
    text = (ROOT / "docs" / "extending" / page).read_text()
    return [re.sub(rf"(?m)^{space}", "", block) for space, block in re.findall(r"(?ms)^( *)```python\n(.*?)^ *```", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_and_name_in_it_exists(page: Path) -> None:
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text())
    everything = "\n".join(SOURCES.values())
    named = 0
    for code in re.findall(r"`([^`\n]+)`", text):
        if "…" in code or "*" in code or " " in code:
            continue
        if re.fullmatch(r"[\w/.]+\.(py|cu|md)|[\w/]+/", code):
            where = ROOT / code
            assert where.exists() or any(path.name == code for path in SOURCES), f"{page.name}: {code}"
            named += 1
        elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?", code):
            for name in set(code.split(".")) - INVENTED:
                assert re.search(rf"\b{name}\b", everything), f"{page.name}: {code}"
    assert named > 5


def test_the_backend_sketched_has_the_interface_that_is_asked_for() -> None:
    (sketch,) = python_blocks("kernel.md")
    methods = re.findall(r"def (\w+\(self.*?\) -> [\w.]+):", sketch)
    interface = SOURCES[ROOT / "gpu_worker" / "attention" / "interface.py"]
    reference = SOURCES[ROOT / "gpu_worker" / "attention" / "torch_backend.py"]
    assert [method.partition("(")[0] for method in methods] == ["__init__", "begin", "attend"]
    assert all(f"def {method}:" in interface for method in methods[1:])
    assert re.search(r"def __init__\(\s*self,\s*cache: torch.Tensor,\s*shape: CacheShape,\s*heads: int", reference)


def load(name: str, source: str, folder: Path) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def test_the_policy_that_is_built_does_what_its_test_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, test = python_blocks("policy.md")
    intake = SOURCES[ROOT / "scheduler_svc" / "intake.py"]
    edited, times = re.subn(r"(?m)^( +)priority = message\.priority if .*$", lambda found: found[1] + change.strip(), intake)
    assert times == 1, "the line that the walk-through replaces"
    imports = SOURCES[ROOT / "tests" / "scheduler_svc" / "test_policies.py"].split("\n@pytest", 1)[0].split("\ndef test_", 1)[0]
    (name,) = re.findall(r"def (test_\w+)", test)
    run = getattr(load("walk_through", f"{imports}\n\n{test}", tmp_path), name)
    with pytest.raises(AssertionError):
        run()  # the policy is not there yet
    monkeypatch.setattr(scheduler_svc.engine, "Intake", load("edited_intake", edited, tmp_path).Intake)
    run()
