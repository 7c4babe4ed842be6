"""Figures that services publish, as a scrape shows them."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pagewire.metrics import FORGET, OWN, Figures
from protocol.families import FAMILIES
from protocol.registration import ServiceRecord
from protocol.series import Histogram, Series
from protocol.telemetry import Telemetry


def scrape(
    figures: Figures, now: float, services: list[ServiceRecord] | None = None
) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(figures.text(services or [], now).decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def labels(**given: str) -> frozenset[tuple[str, str]]:
    return frozenset(given.items())


def test_requests_and_blocks_are_shown_by_state_and_the_rest_by_name() -> None:
    figures = Figures()
    figures.take(Telemetry("frontend", "frontend-0", 1, 2, {"requests_waiting": 3, "requests_finished": 4, "wire_link_resent": 5}), 0.0)
    figures.take(
        Telemetry("scheduler", "scheduler-0", 1, 2, {"blocks_free": 6, "blocks": 9, "requests_waiting": 3, "scheduler_hits": 7}), 0.0
    )
    service = ServiceRecord("worker", "worker-0", 1, 2, "ready", 3)
    seen = scrape(figures, 1.0, [service])
    expected = {
        ("pagewire_requests", labels(name="frontend-0", status="waiting")): 3,
        ("pagewire_requests", labels(name="frontend-0", status="finished")): 4,
        ("pagewire_requests", labels(name="frontend-0", status="failed")): 0,
        ("pagewire_frontend_wire_link_resent", labels(name="frontend-0")): 5,
        ("pagewire_blocks", labels(name="scheduler-0", state="free")): 6,
        ("pagewire_scheduler_blocks", labels(name="scheduler-0")): 9,
        ("pagewire_scheduler_requests_waiting", labels(name="scheduler-0")): 3,
        ("pagewire_scheduler_hits", labels(name="scheduler-0")): 7,
        ("pagewire_service", labels(role="worker", name="worker-0", state="ready")): 1,
    }
    assert seen.items() >= expected.items()
    assert not any(name.startswith(("pagewire_frontend_requests", "pagewire_scheduler_blocks_")) for name, _ in seen)


def test_the_admin_server_has_its_memory_and_no_links() -> None:
    figures = Figures()
    figures.take(Telemetry("admin", "admin", 1, 2, {"memory_bytes": 7}), 0.0)
    about = {"role": "admin", "name": "admin"}
    assert scrape(figures, 0.0) == {
        ("pagewire_process_memory_bytes", labels(**about)): 7,
        ("pagewire_admin_memory_bytes", labels(name="admin")): 7,
    }


def test_a_new_incarnation_replaces_the_old_and_silence_removes_it() -> None:
    figures = Figures()
    figures.take(Telemetry("worker", "worker-0", 1, 2, {"steps": 100}), 0.0)
    figures.take(Telemetry("worker", "worker-0", 2, 3, {"steps": 1}), 1.0)
    assert scrape(figures, 2.0)["pagewire_worker_steps", labels(name="worker-0")] == 1
    assert scrape(figures, 1.0 + FORGET) == {}


def test_names_are_made_fit_for_prometheus() -> None:
    figures = Figures()
    figures.take(Telemetry("worker", "worker-0", 1, 2, {"wire.odd name": 1}), 0.0)
    assert scrape(figures, 0.0)["pagewire_worker_wire_odd_name", labels(name="worker-0")] == 1


def test_what_services_fill_is_shown_under_the_family_s_name_and_the_model_s_public_one() -> None:
    figures = Figures()
    histogram = Histogram("vllm:iteration_tokens_total")
    histogram.observe(1)
    histogram.observe(3, 2)
    histogram.observe(1e9)
    series = [
        Series("vllm:num_requests_running", ["/models/big"], 2.0),
        Series("vllm:prefix_cache_hits", ["/models/big"], 5.0),
        histogram.series(["/models/big"]),
        Series("vllm:from_the_future", ["/models/big"], 1.0),
        Series("vllm:num_requests_waiting", ["too", "many"], 1.0),
    ]
    figures.take(Telemetry("scheduler", "scheduler-0", 1, 2, {}, {}, series), 0.0)
    figures.take(Telemetry("frontend", "frontend-0", 1, 2, {}, {}, [], {"/models/big": "big"}), 0.0)
    seen = scrape(figures, 0.0)
    assert seen["vllm:num_requests_running", labels(model_name="big", name="scheduler-0")] == 2
    assert seen["vllm:prefix_cache_hits_total", labels(model_name="big", name="scheduler-0")] == 5
    buckets = {
        bound: seen["vllm:iteration_tokens_total_bucket", labels(model_name="big", le=bound, name="scheduler-0")]
        for bound in ("1.0", "2.0", "4.0", "+Inf")
    }
    assert buckets == {"1.0": 1, "2.0": 1, "4.0": 3, "+Inf": 4}
    assert seen["vllm:iteration_tokens_total_count", labels(model_name="big", name="scheduler-0")] == 4
    assert seen["vllm:iteration_tokens_total_sum", labels(model_name="big", name="scheduler-0")] == 1e9 + 7
    assert not any("future" in name or "waiting" in name for name, _ in seen if name.startswith("vllm:"))


def samples(figures: Figures, family: str) -> list[tuple[str, str, float]]:
    """(model, service, value) of each line of a family, also of lines with the same labels."""
    families = text_string_to_metric_families(figures.text([], 0.0).decode())
    return [(s.labels["model_name"], s.labels["name"], s.value) for f in families for s in f.samples if s.name == family]


def test_what_a_frontend_has_labelled_itself_is_not_labelled_again() -> None:
    figures = Figures()
    # Its model A went by the public name and was replaced by B, which goes by it now: the counter of A keeps its label.
    series = [Series("vllm:generation_tokens", ["chat"], 7.0), Series("vllm:generation_tokens", ["B"], 2.0)]
    figures.take(Telemetry("frontend", "frontend-0", 1, 2, {}, {}, series, {"B": "chat"}), 0.0)
    figures.take(Telemetry("scheduler", "scheduler-0", 1, 2, {}, {}, [Series("vllm:num_requests_running", ["B"], 1.0)]), 0.0)
    assert samples(figures, "vllm:generation_tokens_total") == [("chat", "frontend-0", 7.0), ("B", "frontend-0", 2.0)]
    assert samples(figures, "vllm:num_requests_running") == [("chat", "scheduler-0", 1.0)]


def test_two_models_do_not_share_a_public_name() -> None:
    figures = Figures()
    figures.take(Telemetry("frontend", "frontend-0", 1, 2, {}, {}, [], {"A": "chat"}), 0.0)
    figures.take(Telemetry("frontend", "frontend-1", 1, 2, {}, {}, [], {"B": "chat"}), 0.0)  # has met the newer models alone
    series = [Series("vllm:num_requests_running", [model], 1.0) for model in ("A", "B")]
    figures.take(Telemetry("scheduler", "scheduler-0", 1, 2, {}, {}, series), 0.0)
    assert samples(figures, "vllm:num_requests_running") == [("chat", "scheduler-0", 1.0), ("B", "scheduler-0", 1.0)]


def test_a_bound_belongs_to_its_bucket_and_millisecond_tokens_are_told_apart() -> None:
    histogram = Histogram("vllm:inter_token_latency_seconds")
    bounds = FAMILIES["vllm:inter_token_latency_seconds"].bounds
    histogram.observe(bounds[3])
    assert histogram.counts[3] == 1
    assert list(bounds) == sorted(set(bounds))
    assert sum(0.0005 <= bound <= 0.002 for bound in bounds) >= 6


def test_every_family_is_there_before_anything_has_happened() -> None:
    text = Figures().text([], 0.0).decode()
    for family in (*FAMILIES.values(), *OWN.values()):
        assert f"# TYPE {family.name}{'_total' if family.kind == 'counter' else ''} {family.kind}" in text


def test_the_busy_share_is_that_of_the_last_second_with_a_step() -> None:
    figures = Figures()

    def worked(step: float, idle: float, incarnation: int = 1) -> float:
        values = {"worker_step_seconds": step, "worker_idle_seconds": idle}
        figures.take(Telemetry("worker", "worker-0", incarnation, 2, values), 0.0)
        return scrape(figures, 0.0)["pagewire_busy_share", labels(name="worker-0")]

    worked(100.0, 900.0)
    assert worked(100.9, 900.1) == pytest.approx(0.9)
    assert worked(100.9, 900.1) == pytest.approx(0.9)
    assert worked(0.5, 0.5, incarnation=2) == pytest.approx(0.5)


def test_stale_messages_are_summed_and_recoveries_told_apart() -> None:
    figures = Figures()
    values = {"wire_session_stale": 2, "wire_session_none_dropped": 3, "wire_scheduler_workers_lost": 1, "memory_bytes": 7}
    figures.take(Telemetry("scheduler", "scheduler-0", 1, 2, values), 0.0)
    seen = scrape(figures, 0.0)
    about = {"role": "scheduler", "name": "scheduler-0"}
    assert seen["pagewire_stale_messages_total", labels(**about)] == 5
    assert seen["pagewire_recoveries_total", labels(**about, kind="worker_lost")] == 1
    assert seen["pagewire_recoveries_total", labels(**about, kind="epoch_yielded")] == 0
    assert seen["pagewire_process_memory_bytes", labels(**about)] == 7
