"""The load generator against the real frontend: every token is counted, every failure named."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from click.testing import CliRunner

from frontend.server import make_app
from pagewire.bench.command import serve
from tests.frontend.fakes import Engine, LocalClient, settings_for


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
    assert ready.wait(60)
    yield url[0]
    running.should_exit = True
    thread.join(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], ["--no-stream"], ["--api", "chat"], ["--concurrency", "2", "--rate", "200", "--repeat", "2", "--warmup", "1"]]
)
def test_a_run_against_a_server_counts_every_token(flags, server, tmp_path):
    out = tmp_path / "out.json"
    # Words are tokens of a byte each here, so chats are kept short.
    sizes = ["--requests", "12", "--input", "5:20", "--output", "3:9", "--vocab", "200", "--processes", "2"]
    start = time.monotonic()
    result = CliRunner().invoke(serve, ["--url", server, *sizes, "--json", str(out), *flags])
    assert result.exit_code == 0, result.output
    elapsed = time.monotonic() - start
    runs = json.loads(out.read_text())["runs"]
    assert len(runs) == (2 if "--repeat" in flags else 1)
    for run in runs:
        assert (run["completed"], run["failed"]) == (12, 0)
        assert run["total_output_tokens"] == sum(record["tokens"] for record in run["records"])
        assert all(3 <= record["tokens"] <= 9 for record in run["records"])
        assert 0 < run["duration"] < elapsed
        assert all(0 < record["first"] - record["start"] <= record["last"] - record["start"] for record in run["records"])
    assert "output throughput" in result.output


@pytest.mark.slow
def test_failures_are_counted_and_named(server):
    sizes = ["--requests", "4", "--input", "5", "--output", "5", "--vocab", "200", "--processes", "1"]
    result = CliRunner().invoke(serve, ["--url", server, "--model", "other", *sizes])
    assert result.exit_code == 1
    assert "4 × status 404" in result.output
    result = CliRunner().invoke(serve, ["--url", "http://127.0.0.1:1", "--model", "any", *sizes])
    assert result.exit_code == 1
    assert "cannot connect" in result.output
