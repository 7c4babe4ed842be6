"""`pagewire bench` against a server whose timings are known, and its reading of responses."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pagewire.bench.command import main
from pagewire.bench.exchange import Exchange, Record
from tests.pagewire.processes import PATIENCE, eventually
from tests.pagewire.scripted_server import Script, scripted_server

SIZES = ["--num-prompts", "6", "--input", "5:20", "--output", "4:6", "--processes", "2"]


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def runs_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    return found


# ---------------------------------------------------------------- reading responses


def event(body: object) -> bytes:
    data = b"data: %b\n\n" % (body if isinstance(body, bytes) else json.dumps(body).encode())
    return b"%x\r\n%b\r\n" % (len(data), data)


RESPONSE = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + event({"choices": [{"text": "a", "index": 0}]})
    + event({"choices": [{"text": "", "index": 0}], "usage": None})
    + event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}})
    + event(b"[DONE]")
    + b"0\r\n\r\n"
)


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("keep", [False, True])
def test_a_response_is_read_however_it_is_cut(step: int, keep: bool) -> None:
    class Transport:
        def write(self, data: bytes) -> None: ...
        def close(self) -> None: ...

    async def run() -> None:
        record = Record(0.0)
        exchange = Exchange(b"", b"", record, True, keep)
        exchange.connection_made(Transport())  # type: ignore[arg-type]
        for at in range(0, len(RESPONSE), step):
            exchange.data_received(RESPONSE[at : at + step])
        await asyncio.wait_for(exchange.done, 1)
        assert (record.error, record.chunks, record.prompt_tokens, record.tokens) == ("", 2, 4, 2)
        assert len(record.gaps) == 1
        assert exchange.answer == ("a" if keep else "")

    asyncio.run(run())


# ---------------------------------------------------------------- against a server with known timings


@pytest.mark.slow
def test_measured_times_are_the_servers(tmp_path: Path) -> None:

    def undisturbed() -> bool:
        """Whether a run's chunks were read as they came: clients that stand still for a moment find several at once."""
        script = Script(wait=0.05, gap=0.02)
        with scripted_server(script) as url:
            result = bench("serve", "--url", url, *SIZES, "--goodput", "ttft:49", "--json", tmp_path / "r.json")
        assert result.exit_code == 0, result.output
        (run,) = runs_of(tmp_path / "r.json")
        assert (run["completed"], run["failed"]) == (6, 0)
        assert run["total_output_tokens"] == sum(body["max_tokens"] for body in script.asked)
        assert run["total_input_tokens"] == sum(len(body["prompt"]) for body in script.asked)
        for record in run["records"]:
            assert record["first"] - record["start"] >= 0.05
            assert record["chunks"] == record["tokens"] == len(record["gaps"]) + 1
            assert sum(record["gaps"]) == pytest.approx(record["last"] - record["first"])
        assert run["mean_ttft_ms"] >= 50
        assert run["request_goodput"] == 0, "no request can be faster than its server"
        assert all(body["model"] == "scripted" for body in script.asked)
        assert "TTFT" in result.output
        least = [0.02 * (record["tokens"] - 1) - 0.002 for record in run["records"]]
        took = [record["last"] - record["first"] for record in run["records"]]
        return run["mean_tpot_ms"] >= 19.5 and all(a >= b for a, b in zip(took, least, strict=True))

    eventually(undisturbed)


@pytest.mark.slow
def test_with_several_tokens_a_chunk_tpot_counts_tokens_and_itl_chunks(tmp_path: Path) -> None:

    def undisturbed() -> bool:
        with scripted_server(Script(gap=0.03, tokens_each=3)) as url:
            bench("serve", "--url", url, *SIZES, "--output", "9", "--json", tmp_path / "r.json")
        (run,) = runs_of(tmp_path / "r.json")
        for record in run["records"]:
            assert (record["tokens"], record["chunks"]) == (9, 3)
        assert run["mean_tpot_ms"] == pytest.approx(run["mean_itl_ms"] * 2 / 8)
        return bool(run["mean_itl_ms"] > 20)

    eventually(undisturbed)


@pytest.mark.slow
def test_a_server_that_counts_no_tokens_has_its_chunks_counted(tmp_path: Path) -> None:
    with scripted_server(Script(usage=False)) as url:
        assert bench("serve", "--url", url, *SIZES, "--api", "chat", "--json", tmp_path / "r.json").exit_code == 0
    assert all(4 <= record["tokens"] <= 6 for record in runs_of(tmp_path / "r.json")[0]["records"])


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_are_under_way_than_allowed(concurrency: int) -> None:
    script = Script(together=concurrency)
    with scripted_server(script) as url:
        bench("serve", "--url", url, *SIZES, "--max-concurrency", str(concurrency))
    assert script.most == concurrency
    assert len(script.asked) == 6


@pytest.mark.slow
def test_conversations_take_turns(tmp_path: Path) -> None:
    script = Script(wait=0.0, gap=0.0)
    arguments = ["--workload", "multi-turn", "--api", "chat", "--turns", "3", "--num-prompts", "2", "--output", "2", "--processes", "1"]
    with scripted_server(script) as url:
        result = bench("serve", "--url", url, *arguments, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert sorted(len(body["messages"]) for body in script.asked) == [1, 1, 3, 3, 5, 5]
    last = max(script.asked, key=lambda body: len(body["messages"]))
    assert [message["content"] for message in last["messages"][1::2]] == ["w0 w1 ", "w0 w1 "]
    assert sorted(record["turn"] for record in runs_of(tmp_path / "r.json")[0]["records"]) == [0, 0, 1, 1, 2, 2]


@pytest.mark.slow
def test_throughput_asks_for_whole_answers_all_at_once() -> None:
    script = Script(together=6)
    with scripted_server(script) as url:
        result = bench("throughput", "--url", url, *SIZES, "--api-key", "secret")
    assert result.exit_code == 0, result.output
    assert script.most == 6
    assert not any("stream" in body for body in script.asked)
    assert all(b"Bearer secret" in head for head in script.headers)
    assert "output throughput" in result.output


@pytest.mark.slow
def test_latency_is_that_of_a_whole_batch(tmp_path: Path) -> None:
    script = Script(wait=0.04, gap=0.01)
    sizes = [
        "--batch-size",
        "3",
        "--input-len",
        "7",
        "--output-len",
        "5",
        "--num-iters",
        "2",
        "--num-iters-warmup",
        "1",
        "--processes",
        "1",
    ]
    with scripted_server(script) as url:
        result = bench("latency", "--url", url, *sizes, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert len(script.asked) == 9
    assert {(len(body["prompt"]), body["max_tokens"]) for body in script.asked} == {(7, 5)}
    saved = json.loads((tmp_path / "r.json").read_text())
    assert len(saved["runs"]) == 2
    assert saved["settings"]["latency_ms"] >= 79
    assert saved["settings"]["latency_ms"] == pytest.approx(sum(1000 * run["duration"] for run in saved["runs"]) / 2)


@pytest.mark.slow
def test_repeats_and_warm_up_ask_the_same_again() -> None:
    script = Script(wait=0.0, gap=0.0)
    with scripted_server(script) as url:
        result = bench("serve", "--url", url, *SIZES, "--repeat", "2", "--warmup", "1", "--rate", "200")
    assert "run 2" in result.output
    prompts = [tuple(body["prompt"]) for body in script.asked]
    assert len(prompts) == 13
    assert len(set(prompts)) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("script", "words"), [(Script(status=503), "6 × status 503"), (Script(break_off=True), "closed early")])
def test_failures_are_counted_and_named(script: Script, words: str) -> None:
    with scripted_server(script) as url:
        result = bench("serve", "--url", url, *SIZES)
    assert result.exit_code == 1
    assert words in result.output
    assert "failed 6" in result.output


def test_a_server_that_is_not_there_gets_one_line() -> None:
    result = bench("serve", "--url", "http://127.0.0.1:1", *SIZES)
    assert result.exit_code == 1
    assert result.output.startswith("Error: cannot reach http://127.0.0.1:1")


@pytest.mark.slow
def test_a_picture_is_drawn_of_a_run_and_of_two(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    with scripted_server(Script()) as url:
        assert bench("serve", "--url", url, *SIZES, "--json", a, "--plot", tmp_path / "a.png").exit_code == 0
        bench("serve", "--url", url, *SIZES, "--json", b)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    result = bench("serve", "--compare", a, b, "--plot", tmp_path / "both.svg")
    assert result.exit_code == 0, result.output
    assert "mean_ttft_ms" in result.output
    assert "b.json" in (tmp_path / "both.svg").read_text() or (tmp_path / "both.svg").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments",
    [
        ["--goodput", "speed:3"],
        ["--input", "many"],
        ["--metric-percentiles", "101"],
        ["--compare", __file__, __file__],
        ["--num-prompts", "0"],
        ["--request-rate", "nan"],
        ["--request-rate", "0"],
        ["--seconds", "nan"],
        ["--json", "/there/is/no/such/folder.json"],
        ["--plot", "/there/is/no/such/folder.png"],
    ],
)
def test_a_mistake_gets_one_line_and_code_2(arguments: list[str]) -> None:
    result = bench("serve", "--url", "http://127.0.0.1:1", *arguments)
    assert result.exit_code == 2
    assert "Error: " in result.output


@pytest.mark.slow
def test_the_script_of_a_checkout_runs_the_same() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "http_load.py"
    with scripted_server(Script()) as url:
        assert urllib.request.urlopen(f"{url}/v1/models").status == 200
        command = [sys.executable, str(script), "--url", url, "--requests", "3", "--concurrency", "2", "--input", "5", "--output", "4"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "completed 3, failed 0" in done.stdout
