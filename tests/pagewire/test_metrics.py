"""Figures that services publish, as a scrape shows them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from pagewire.metrics import FORGET, Figures
from protocol.rundir import ServiceRecord
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
    assert seen == {
        ("pagewire_requests", labels(name="frontend-0", status="waiting")): 3,
        ("pagewire_requests", labels(name="frontend-0", status="finished")): 4,
        ("pagewire_frontend_wire_link_resent", labels(name="frontend-0")): 5,
        ("pagewire_blocks", labels(name="scheduler-0", state="free")): 6,
        ("pagewire_scheduler_blocks", labels(name="scheduler-0")): 9,
        ("pagewire_scheduler_requests_waiting", labels(name="scheduler-0")): 3,
        ("pagewire_scheduler_hits", labels(name="scheduler-0")): 7,
        ("pagewire_service", labels(role="worker", name="worker-0", state="ready")): 1,
    }


def test_a_new_incarnation_replaces_the_old_and_silence_removes_it() -> None:
    figures = Figures()
    figures.take(Telemetry("worker", "worker-0", 1, 2, {"steps": 100}), 0.0)
    figures.take(Telemetry("worker", "worker-0", 2, 3, {"steps": 1}), 1.0)
    assert scrape(figures, 2.0) == {("pagewire_worker_steps", labels(name="worker-0")): 1}
    assert scrape(figures, 1.0 + FORGET) == {}


def test_names_are_made_fit_for_prometheus() -> None:
    figures = Figures()
    figures.take(Telemetry("worker", "worker-0", 1, 2, {"wire.odd name": 1}), 0.0)
    assert scrape(figures, 0.0) == {("pagewire_worker_wire_odd_name", labels(name="worker-0")): 1}
