"""The coming and going of services, as the live page tells it."""

from __future__ import annotations

from pagewire.metrics import Figures
from pagewire.monitor import Monitor
from pagewire.watch import MISSED, Watch
from protocol.registration import ServiceRecord


def record(name: str, pid: int, state: str = "ready") -> ServiceRecord:
    return ServiceRecord(name.split("-")[0], name, pid, pid, state, 1)


def events(watch: Watch) -> list[str]:
    """The newest first."""
    return [event["text"] for event in watch.picture(0.0)["events"]]


def test_whoever_is_there_at_the_first_look_has_not_appeared() -> None:
    watch = Watch(Figures(), Monitor(0.0))
    services = [record("admin-0", 1), record("scheduler-0", 2), record("worker-0", 3)]
    watch.look(services, 0.0)
    assert events(watch) == []
    watch.look([*services, record("worker-1", 4)], 1.0)
    assert events(watch) == ["worker-1 (pid 4) appeared"]


def test_deaths_and_returns_are_told_and_who_is_missed_is_shown_for_a_while() -> None:
    watch = Watch(Figures(), Monitor(0.0))
    admin = record("admin-0", 1)
    watch.look([admin, record("worker-0", 2)], 0.0)
    watch.look([admin, record("worker-0", 3)], 1.0)
    assert events(watch) == ["worker-0 (pid 3) was started again", "worker-0 (pid 2) died"]
    watch.look([admin], 2.0)
    watch.look([admin], 2.0 + MISSED)
    assert events(watch)[0] == "worker-0 (pid 3) has gone"
    assert [service["state"] for service in watch.picture(0.0)["services"]] == ["gone", "ready"]
    watch.look([admin], 2.1 + MISSED)
    assert [service["name"] for service in watch.picture(0.0)["services"]] == ["admin-0"]
