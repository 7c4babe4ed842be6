"""The small edition as its readers meet it: short, with the packaged model, and as programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "simple_vllm"
FILES = ("simple_engine.py", "simple_scheduler.py", "simple_attention.py", "simple_cache.py")
PROMPTS = ["The capital of France is", "Once upon a time, in a small village by the sea, there lived", "2, 4, 6, 8,", "Water boils at"]


def run(*command: str, timeout: float = 200.0) -> str:
    """Output of a Python program started in the small edition's folder."""
    return subprocess.run([sys.executable, *command], cwd=FOLDER, capture_output=True, text=True, timeout=timeout, check=True).stdout


def test_its_four_files_are_read_in_one_sitting() -> None:
    assert sum(len((FOLDER / name).read_text().splitlines()) for name in FILES) < 500


def test_it_stands_alone() -> None:
    for file in FOLDER.glob("*.py"):
        assert not re.search(r"^\s*(?:from|import) (?:frontend|scheduler_svc|gpu_worker|protocol|pagewire)\b", file.read_text(), re.M), file


def test_the_guided_text_names_files_and_tests_that_exist() -> None:
    root, text = FOLDER.parents[1], (FOLDER.parents[1] / "docs" / "learn" / "README.md").read_text()
    named = set(re.findall(r"`((?:frontend|scheduler_svc|gpu_worker|protocol|pagewire)/[\w/.]*)`", text))
    assert len(named) > 8
    for path in named:
        assert (root / path).exists(), path
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert (root / "docs" / "learn" / path).exists(), path
    tests = (FOLDER / "test_simple_engine.py").read_text()
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(600)
def test_greedy_equals_transformers_with_the_packaged_model() -> None:
    script = f"""
import json, torch
torch.set_num_threads(1)
from simple_engine import SimpleLLMEngine, load
model, tokenizer = load("")
prompts = {PROMPTS!r}
engine = SimpleLLMEngine(model, max_batch_size=3, tokenizer=tokenizer)
ours = engine.generate(prompts, max_tokens=24)
theirs = []
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=24, do_sample=False, repetition_penalty=1.0)
    theirs.append(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps([ours, theirs, engine.cache.free_blocks, engine.cache.num_blocks]))
"""
    ours, theirs, free, blocks = json.loads(run("-c", script, timeout=580).splitlines()[-1])
    assert ours == theirs
    assert "Paris" in ours[0]
    assert free == blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and a byte tokenizer."""
    path = tmp_path_factory.mktemp("model")
    script = (
        "import sys, test_simple_engine as t; t.tiny_llama().save_pretrained(sys.argv[1]); t.byte_tokenizer().save_pretrained(sys.argv[1])"
    )
    run("-c", script, str(path))
    return path


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of a running server.py."""
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, "server.py", "--model", str(folder), "--port", "0"]
        process = subprocess.Popen(command, cwd=FOLDER, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 90
        while not (found := re.search(r"running on (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield found[1]
    finally:
        process.terminate()
        process.wait(100)
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_the_client_gets_its_answers_from_the_server(server: str) -> None:
    lines = run("client.py", "Hello", "Good-bye", "--url", server, "--max-tokens", "5").splitlines()
    assert [re.sub(r"^request-\d+: ", "", line)[:5] for line in lines if line.startswith("request-")] == ["Hello", "Good-"]


@pytest.mark.slow
def test_the_benchmark_prints_a_row_for_each_batch_size(folder: Path) -> None:
    output = run("benchmark.py", "--model", str(folder), "--requests", "4", "--max-tokens", "8", "--batch-sizes", "1", "4")
    assert [line.split()[0] for line in output.splitlines()] == ["batch", "1", "4"]
