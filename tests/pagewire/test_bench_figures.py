"""The bench's figures: a recorded run with known timings, against definitions written out a second time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.bench.exchange import Record
from pagewire.bench.figures import figures, percentile, times
from pagewire.bench.report import ReportError, comparison, read_result, table

# Three requests: sent at 10.0, 10.5 and 11.0 s; one more that failed.
RECORDED = [
    Record(start=10.0, first=10.1, last=10.5, gaps=[0.1, 0.1, 0.2], prompt_tokens=7, tokens=5, chunks=4),
    Record(start=10.5, first=10.8, last=10.8, gaps=[], prompt_tokens=3, tokens=1, chunks=1),
    Record(start=11.0, first=11.05, last=12.05, gaps=[0.5, 0.5], prompt_tokens=10, tokens=3, chunks=3),
    Record(start=10.0, error="status 500"),
]


def test_a_recorded_run_gives_the_figures_that_its_timings_mean() -> None:
    found = figures(RECORDED)
    assert (found["completed"], found["failed"], found["errors"]) == (3, 1, {"status 500": 1})
    assert (found["total_input_tokens"], found["total_output_tokens"], found["chunks"]) == (20, 9, 8)
    assert found["duration"] == pytest.approx(2.05)
    assert found["request_throughput"] == pytest.approx(3 / 2.05)
    assert found["output_throughput"] == pytest.approx(9 / 2.05)
    assert found["total_token_throughput"] == pytest.approx(29 / 2.05)
    assert times(RECORDED, "ttft") == pytest.approx([100, 300, 50])
    assert times(RECORDED, "tpot") == pytest.approx([100, 500]), "a request of one token has none"
    assert times(RECORDED, "itl") == pytest.approx([100, 100, 200, 500, 500])
    assert times(RECORDED, "e2el") == pytest.approx([500, 300, 1050])
    assert found["median_ttft_ms"] == pytest.approx(100)
    assert found["mean_itl_ms"] == pytest.approx(280)
    assert found["std_tpot_ms"] == pytest.approx(200)
    assert found["p90_e2el_ms"] == pytest.approx(500 + 0.8 * 550)


@pytest.mark.parametrize(
    ("objectives", "kept"),
    [({"ttft": 100.1}, 2), ({"tpot": 100.1}, 2), ({"e2el": 600}, 2), ({"ttft": 60, "e2el": 600}, 0), ({"ttft": 1000, "tpot": 1000}, 3)],
)
def test_goodput_counts_requests_that_keep_every_objective(objectives: dict[str, float], kept: int) -> None:
    assert figures(RECORDED, objectives)["request_goodput"] == pytest.approx(kept / 2.05)


def test_a_run_in_which_everything_failed_has_figures_too() -> None:
    found = figures([Record(start=1.0, error="x"), Record(start=2.0, error="x")], {"ttft": 1})
    assert (found["completed"], found["failed"], found["request_throughput"], found["request_goodput"]) == (0, 2, 0.0, 0.0)
    assert "2 × x" in table(found)
    json.dumps(found, allow_nan=False)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-9)


a_record = st.builds(
    lambda start, wait, gaps, extra, prompt: Record(
        start, start + wait, start + wait + sum(gaps), gaps, prompt, len(gaps) + 1 + extra, len(gaps) + 1
    ),
    st.floats(0, 100), st.floats(0.001, 5), st.lists(st.floats(0.001, 1), max_size=8), st.integers(0, 3), st.integers(1, 99),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(a_record, min_size=1, max_size=12), st.floats(1, 3000), st.floats(1, 500))
def test_the_definitions_are_those_of_vllms_bench(records: list[Record], ttft: float, tpot: float) -> None:
    """As its documentation states them: per-request TTFT, latency and output length; TPOT from these; ITLs pooled."""
    latencies = np.array([r.last - r.start for r in records])
    ttfts = np.array([r.first - r.start for r in records])
    lengths = np.array([r.tokens for r in records])
    per_token = (latencies - ttfts) / np.maximum(lengths - 1, 1) * (lengths > 1)
    found = figures(records, {"ttft": ttft, "tpot": tpot})
    duration = max(r.last for r in records) - min(r.start for r in records)
    assert found["mean_ttft_ms"] == pytest.approx(1000 * ttfts.mean())
    assert found["p99_e2el_ms"] == pytest.approx(1000 * np.percentile(latencies, 99))
    if (lengths > 1).any():
        assert found["median_tpot_ms"] == pytest.approx(1000 * np.median(per_token[lengths > 1]))
        assert found["std_tpot_ms"] == pytest.approx(1000 * np.std(per_token[lengths > 1]), abs=1e-6)
    gaps = [gap for r in records for gap in r.gaps]
    assert found["mean_itl_ms"] == pytest.approx(1000 * np.mean(gaps) if gaps else 0.0)
    edges = np.concatenate((abs(1000 * ttfts - ttft), abs(1000 * per_token - tpot)))
    if edges.min() > 1e-6:
        kept = ((1000 * ttfts <= ttft) & (1000 * per_token <= tpot)).sum()
        assert found["request_goodput"] == pytest.approx(kept / duration)


# ---------------------------------------------------------------- results on disk


def result(path: Path, *runs: dict[str, float]) -> Path:
    path.write_text(json.dumps({"settings": {}, "runs": [{"duration": 1.0, "errors": {}, **run} for run in runs]}))
    return path


def test_two_results_stand_beside_one_another(tmp_path: Path) -> None:
    a = read_result(result(tmp_path / "a.json", {"output_throughput": 100.0, "mean_ttft_ms": 20.0, "chunks": 5}))
    b = read_result(result(tmp_path / "b.json", {"output_throughput": 90.0, "mean_ttft_ms": 10.0, "chunks": 6}))
    lines = {line.split()[0]: line for line in comparison(a, b, ("a.json", "b.json")).splitlines() if not line.startswith(" ")}
    assert lines["output_throughput"].split()[1:] == ["100.00", "90.00", "-10.0%"]
    assert lines["mean_ttft_ms"].split()[1:] == ["20.00", "10.00", "-50.0%", "*"]
    assert "chunks" not in lines


def test_of_several_runs_the_median_is_compared(tmp_path: Path) -> None:
    runs = [{"output_throughput": float(value)} for value in (10, 90, 20)]
    assert read_result(result(tmp_path / "a.json", *runs))["output_throughput"] == 20


def test_a_flat_result_file_of_vllm_is_read(tmp_path: Path) -> None:
    path = tmp_path / "vllm.json"
    path.write_text(json.dumps({"date": "x", "duration": 2.0, "completed": 9, "mean_ttft_ms": 3.5, "itls": [[0.1]], "model_id": "m"}))
    assert read_result(path) == {"duration": 2.0, "completed": 9, "mean_ttft_ms": 3.5}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"runs": []}', '{"runs": [3]}', '{"a": 1}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ReportError):
        read_result(tmp_path / "x.json")
