"""The load generator: its figures on a recorded run, its reading of responses, and a run against a live server."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from benchmarks import http_load
from frontend.server import make_app
from tests.frontend.fakes import Engine, LocalClient, settings_for


def test_the_figures_of_a_recorded_run():
    records = [
        http_load.Record(start=10.0, first=10.1, last=10.5, gaps=[0.1, 0.1, 0.2], prompt_tokens=7, tokens=5, chunks=4),
        http_load.Record(start=10.5, first=10.8, last=10.8, gaps=[], prompt_tokens=3, tokens=1, chunks=1),
        http_load.Record(start=9.0, error="status 500"),
    ]
    result = http_load.summary(records)
    assert (result["completed"], result["failed"], result["errors"]) == (2, 1, {"status 500": 1})
    assert (result["prompt_tokens"], result["output_tokens"], result["chunks"]) == (10, 6, 5)
    assert result["duration_s"] == pytest.approx(1.8)
    assert result["requests_per_s"] == pytest.approx(2 / 1.8)
    assert result["output_tokens_per_s"] == pytest.approx(6 / 1.8)
    assert result["ttft_ms"]["p50"] == pytest.approx(200)
    assert result["tpot_ms"]["mean"] == pytest.approx(100), "a single token has no time per further token"
    assert result["itl_ms"]["mean"] == pytest.approx(400 / 3)
    assert result["e2e_ms"]["p90"] == pytest.approx(300 + 0.9 * 200)


def test_percentiles_interpolate():
    assert http_load.percentile([3, 1, 2, 4], 50) == 2.5
    assert http_load.percentile([5], 99) == 5
    assert http_load.percentile(range(101), 90) == 90


def test_the_workload_is_the_same_for_the_same_seed():
    def made(*flags: str) -> list[object]:
        return http_load.workload(http_load.parser().parse_args(["--requests", "20", "--rate", "5", *flags]))

    assert made() == made() != made("--seed", "1")
    times = [request.at for request in made("--arrivals", "even")]
    assert times == pytest.approx([i / 5 for i in range(20)])
    assert len(made("--seconds", "1", "--arrivals", "even")) == 5


def test_lengths_come_from_a_file_of_pairs(tmp_path):
    file = tmp_path / "lengths.json"
    file.write_text("[[3, 5], [900, 200], [2, 4]]")
    args = http_load.parser().parse_args(["--lengths", str(file), "--max-total", "100", "--requests", "3", "--shared-prefix", "10"])
    bodies = [json.loads(request.body) for request in http_load.workload(args)]
    assert [(len(body["prompt"]), body["max_tokens"]) for body in bodies] == [(13, 5), (12, 4), (13, 5)]
    assert bodies[0]["prompt"][:10] == bodies[1]["prompt"][:10]


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
def test_a_response_is_read_however_it_is_cut(step):
    class Transport:
        def write(self, data: bytes) -> None: ...
        def close(self) -> None: ...

    async def main() -> None:
        record = http_load.Record(0.0)
        exchange = http_load.Exchange(b"", b"", record, True)
        exchange.connection_made(Transport())
        for at in range(0, len(RESPONSE), step):
            exchange.data_received(RESPONSE[at : at + step])
        await asyncio.wait_for(exchange.done, 1)
        assert (record.error, record.chunks, record.prompt_tokens, record.tokens) == ("", 2, 4, 2)
        assert len(record.gaps) == 1

    asyncio.run(main())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The real application on a real port, in a thread, over a scripted scheduler."""
    ready, url = threading.Event(), []

    class Server(uvicorn.Server):
        async def startup(self, sockets: object = None) -> None:
            await client.start()
            await super().startup()
            url.append(f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}")
            ready.set()

    client = LocalClient(settings_for(tmp_path), Engine())
    running = Server(uvicorn.Config(make_app(client), port=0, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    assert ready.wait(20)
    yield url[0]
    running.should_exit = True
    thread.join(10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], ["--no-stream"], ["--api", "chat"], ["--concurrency", "2", "--rate", "200", "--repeat", "2", "--warmup", "1"]]
)
def test_a_run_against_a_server_counts_every_token(flags, server, tmp_path, capsys):
    out = tmp_path / "out.json"
    # Words are tokens of a byte each here, so chats are kept short.
    sizes = ["--requests", "12", "--input", "5:20", "--output", "3:9", "--vocab", "200", "--processes", "2"]
    start = time.monotonic()
    assert http_load.main(["--url", server, *sizes, "--json", str(out), *flags]) == 0
    elapsed = time.monotonic() - start
    runs = json.loads(out.read_text())["runs"]
    assert len(runs) == (2 if "--repeat" in flags else 1)
    for run in runs:
        assert (run["completed"], run["failed"]) == (12, 0)
        assert run["output_tokens"] == sum(record["tokens"] for record in run["records"])
        assert all(3 <= record["tokens"] <= 9 for record in run["records"])
        assert 0 < run["duration_s"] < elapsed
        assert all(0 < record["first"] - record["start"] <= record["last"] - record["start"] for record in run["records"])
    assert "output tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_failures_are_counted_and_named(server, capsys):
    sizes = ["--requests", "4", "--input", "5", "--output", "5", "--vocab", "200", "--processes", "1"]
    assert http_load.main(["--url", server, "--model", "other", *sizes]) == 1
    assert "4 × status 404" in capsys.readouterr().out
    assert http_load.main(["--url", "http://127.0.0.1:1", *sizes]) == 1
    assert "cannot connect" in capsys.readouterr().out
