"""Rows of GPU benchmarks: where they are written, and what is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu_results
from benchmarks.gpu_offline import QUICK, Bench, setting
from benchmarks.gpu_shapes import model_folder


class Llm:
    """Answers with as many tokens as asked for, less `short`."""

    def __init__(self, short: int = 0) -> None:
        self.short, self.asked = short, []

    def generate(self, prompts: list[list[int]], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.asked.append([(len(p), q.max_tokens) for p, q in zip(prompts, params, strict=True)])
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * (q.max_tokens - self.short))]) for q in params]


def test_rows_of_several_benchmarks_share_the_file_of_card_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_results, "card", lambda: "NVIDIA H100 80GB HBM3")
    gpu_results.add_rows(tmp_path, "small", {"a": 1.0, "b": 2.0}, "one", "how a and b")
    path = gpu_results.add_rows(tmp_path, "small", {"b": 3.0, "c": 4.0}, "two", "how b and c")
    assert path == tmp_path / "h100-small.json"
    record = json.loads(path.read_text())
    assert record["rows"] == {"a": 1.0, "b": 3.0, "c": 4.0}
    assert record["notes"] == {"one": "how a and b", "two": "how b and c"}
    assert record["card"] == "NVIDIA H100 80GB HBM3"
    assert record["shape"] == "small"


def test_the_rows_of_the_offline_table_ask_for_its_prompts() -> None:
    llm = Llm()
    bench = Bench("", {}, QUICK, runs=2)
    found = bench.steps(llm) | bench.long(llm) | bench.shared(llm)  # type: ignore[arg-type]
    assert list(found) == ["step_b1_ms", "step_b4_ms", "prefill_tok_s", "long_decode_ms", "shared_prefix_req_s"]
    assert all(len(figures) == 2 for figures in found.values())
    assert llm.asked[0] == [(128, 16)]
    assert llm.asked[-1] == [(128 + 64, 8)] * 8


def test_a_missing_token_is_no_figure() -> None:
    with pytest.raises(SystemExit, match="length"):
        Bench("", {}, QUICK, runs=1).steps(Llm(short=1))  # type: ignore[arg-type]


def test_settings_and_shapes_are_read_from_the_command_line(tmp_path: Path) -> None:
    assert [setting(text) for text in ("threads=1", "device=cpu", "enforce_eager=true")] == [
        ("threads", 1),
        ("device", "cpu"),
        ("enforce_eager", True),
    ]
    with pytest.raises(SystemExit, match=r"qwen3-0\.6b"), model_folder(str(tmp_path / "none")):
        pass
    (tmp_path / "config.json").write_text("{}")
    with model_folder(str(tmp_path)) as folder:
        assert folder == tmp_path
