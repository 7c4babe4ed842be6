"""The Grafana file: every query of it, run over two scrapes of a stack at work, returns data."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.stack import eventually, stack, stream_completion
from tests.pagewire.promql import Query, Scrape

FILE = Path(__file__).parents[2] / "docs" / "grafana" / "pagewire.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def of_requests(figures: dict[str, float], label: str) -> list[float]:
    """The counts of HTTP requests with a label."""
    return [value for name, value in figures.items() if name.startswith("pagewire_http_requests_total{") and label in name]


@pytest.fixture(scope="module")
def scrapes() -> Iterator[tuple[Scrape, Scrape]]:
    """Before and after some requests, of which one fails and one finds its prefix."""
    with stack() as made:
        made.up("--runner", "oracle", "--served-model-name", "small")

        def work() -> None:
            for i in range(3):
                stream_completion(
                    made.url, {"prompt": "a long enough beginning for a block " * 3, "max_tokens": 20 + i, "ignore_eos": True}
                )
            assert httpx.post(f"{made.url}/v1/completions", json={"prompt": "x", "temperature": -1}, timeout=60).status_code == 400
            host, port = made.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), 60) as connection:
                connection.sendall(b"this is no HTTP\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 400")

        def scrape(requests: int) -> Scrape:
            def complete() -> bool:  # the figures of all services are from behind the requests
                figures = made.metrics()
                prompts = figures.get('vllm:request_prompt_tokens_count{model_name="small",name="frontend-0"}', 0)
                plans = figures.get('vllm:iteration_tokens_total_count{model_name="small",name="scheduler-0"}', 0)
                steps = figures.get('pagewire_worker_steps{name="worker-0"}', 0)  # those that only give blocks back are among them
                refused = {code: sum(of_requests(figures, f'code="{code}"')) for code in ("invalid_value", "invalid_http")}
                return prompts == requests and steps >= plans >= 20 * requests and set(refused.values()) == {requests // 3}

            eventually(complete)
            return Scrape.of(httpx.get(f"{made.admin}/metrics", timeout=60).text, time.monotonic())

        work()
        before = scrape(3)
        work()
        yield before, scrape(6)


@pytest.mark.slow
@pytest.mark.parametrize(("panel", "query"), QUERIES)
def test_every_query_returns_data(panel: str, query: str, scrapes: tuple[Scrape, Scrape]) -> None:
    result = Query(query.replace("$model_name", "small").replace("$__rate_interval", "1m")).evaluate(*scrapes)
    assert isinstance(result, dict)
    assert result
    assert all(math.isfinite(value) for value in result.values()), result


@pytest.mark.slow
def test_queries_give_what_was_done(scrapes: tuple[Scrape, Scrape]) -> None:
    def value(query: str) -> float:
        result = Query(query).evaluate(*scrapes)
        assert isinstance(result, dict)
        [number] = result.values()
        return number

    assert value('sum(increase(vllm:generation_tokens_total{model_name="small"}[1m]))') == 63
    assert value('sum(increase(pagewire_http_requests_total{code="invalid_value"}[1m]))') == 1
    assert value('sum(increase(pagewire_http_requests_total{path="other",code="invalid_http",status="400"}[1m]))') == 1
    assert 0 < value('histogram_quantile(0.5, sum by (le) (rate(vllm:inter_token_latency_seconds_bucket{model_name="small"}[1m])))') < 1
    assert value('sum(increase(vllm:prefix_cache_hits_total{model_name="small"}[1m]))') > 0


@pytest.mark.slow
def test_a_query_of_what_is_not_there_fails(scrapes: tuple[Scrape, Scrape]) -> None:
    for query in (
        "vllm:no_such_metric",
        'sum(vllm:num_requests_running{no_label="x"})',
        "rate(pagewire_blocks)",
        "sum(pagewire_blocks[1m])",
    ):
        with pytest.raises(ValueError):
            Query(query).evaluate(*scrapes)


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        assert not cells & taken, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        taken |= cells


def test_the_dashboard_asks_for_its_data_source_and_model() -> None:
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "model_name"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"


def test_a_quantile_is_found_within_its_bucket() -> None:
    text = "# TYPE h histogram\n" + "".join(f'h_bucket{{le="{le}"}} {n}\n' for le, n in (("1", 0), ("2", 10), ("4", 10), ("+Inf", 20)))
    scrape = Scrape.of(text + "h_sum 1\nh_count 20\n", 1.0)
    assert Query("histogram_quantile(0.25, h_bucket)").evaluate(scrape, scrape) == {frozenset(): 1.5}
    assert Query("histogram_quantile(0.99, h_bucket)").evaluate(scrape, scrape) == {frozenset(): 4.0}
