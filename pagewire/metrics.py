"""Telemetry as Prometheus text.

Three kinds of families: those that services fill by name and label (`protocol/families.py`), those made here of several
figures (`OWN`), and every other figure under `pagewire_ROLE_NAME`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.utils import floatToGoString

from protocol.families import FAMILIES, Family
from protocol.registration import ServiceRecord
from protocol.telemetry import Telemetry

FORGET = 10.0  # seconds without figures after which a service is no longer shown
STATES = {  # what a role's figures of a kind count by state: families of their own
    ("frontend", "requests"): ("waiting", "running", "finished", "failed", "aborted"),
    ("scheduler", "blocks"): ("free", "cached", "used"),
}
STALE = ("session_stale", "session_stale_unsent", "session_none_dropped", "welcome_stale", "welcome_lower_epoch")
RECOVERIES = {  # counter -> what was recovered from
    "scheduler_workers_lost": "worker_lost",
    "scheduler_workers_fenced": "worker_fenced",
    "session_closed": "session_closed",
    "epoch_yielded": "epoch_yielded",
}
OWN = {
    family.name: family
    for family in (
        Family("pagewire_service", "gauge", "1 for each running service.", ("role", "name", "state")),
        Family("pagewire_requests", "gauge", "Requests of a frontend, by status.", ("name", "status")),
        Family("pagewire_blocks", "gauge", "KV blocks of a scheduler's workers, by state.", ("name", "state")),
        Family("pagewire_plans_in_flight", "gauge", "Plans sent and not yet answered.", ("role", "name")),
        Family("pagewire_busy_share", "gauge", "Time in steps over time in steps and between them, in the last second of work.", ("name",)),
        Family("pagewire_link_round_trip_seconds", "gauge", "Round trip of the link to the scheduler.", ("role", "name")),
        Family("pagewire_process_memory_bytes", "gauge", "Resident memory.", ("role", "name")),
        Family("pagewire_stale_messages", "counter", "Messages of another session or scheduler, dropped.", ("role", "name")),
        Family("pagewire_recoveries", "counter", "What had to be recovered from.", ("role", "name", "kind")),
    )
}
GAUGES = {  # figure -> its family
    "plans_in_flight": "pagewire_plans_in_flight",
    "link_round_trip_seconds": "pagewire_link_round_trip_seconds",
    "memory_bytes": "pagewire_process_memory_bytes",
}
_KINDS: dict[str, Any] = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "histogram": HistogramMetricFamily}
_LETTERS = re.compile("[^a-zA-Z0-9_]")


class Figures:
    """The latest figures of every service; gauges are what the services said last."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, Telemetry]] = {}
        self._busy: dict[str, float] = {}  # by worker

    def take(self, telemetry: Telemetry, now: float) -> None:
        """Take what a service published. The newest message of a name wins, so a new incarnation replaces the old one."""
        _, last = self._latest.get(telemetry.name, (now, None))
        before = last.values if last is not None and last.incarnation == telemetry.incarnation else {}
        step, idle = (telemetry.values.get(key, 0.0) - before.get(key, 0.0) for key in ("worker_step_seconds", "worker_idle_seconds"))
        if step > 0:
            self._busy[telemetry.name] = step / (step + idle)
        self._latest[telemetry.name] = (now, telemetry)

    def current(self, now: float) -> list[Telemetry]:
        """The figures of the services heard lately."""
        self._latest = {name: entry for name, entry in self._latest.items() if now - entry[0] < FORGET}
        return [telemetry for _, telemetry in self._latest.values()]

    def text(self, services: list[ServiceRecord], now: float | None = None) -> bytes:
        """The exposition format, of these figures and of the services found running."""
        registry = CollectorRegistry(auto_describe=False)
        current = self.current(time.monotonic() if now is None else now)
        registry.register(_Families(current, services, self._busy))
        return generate_latest(registry)


class _Families:
    """All families of a scrape."""

    def __init__(self, current: list[Telemetry], services: list[ServiceRecord], busy: dict[str, float]) -> None:
        self._current = current
        self._services = services
        self._busy = busy
        self._found: dict[str, Metric] = {}

    def collect(self) -> Iterator[Metric]:
        served: dict[str, str] = {}  # models' own names -> public ones, each of one model
        for telemetry in self._current:
            served |= {model: public for model, public in telemetry.served.items() if public not in served.values()}
        for family in (*FAMILIES.values(), *OWN.values()):  # there even if they are empty
            self._found[family.name] = _KINDS[family.kind](family.name, family.help, labels=family.labels)
        for telemetry in self._current:
            self._of_a_family(telemetry, {} if telemetry.role == "frontend" else served)  # a frontend's labels are the public names
            self._own(telemetry)
            self._others(telemetry)
        for service in self._services:
            self._add("pagewire_service", [service.role, service.name, service.state], 1)
        yield from self._found.values()

    def _add(self, family: str, labels: list[str], *value: Any) -> None:
        self._found[family].add_metric(labels, *value)  # type: ignore[attr-defined]  # every kind has it

    def _of_a_family(self, telemetry: Telemetry, served: dict[str, str]) -> None:
        for sample in telemetry.series:
            family = FAMILIES.get(sample.family)
            told = [*sample.labels, telemetry.name]
            if family is None or len(told) != len(family.labels):
                continue  # a service of another version
            labels = [served.get(label, label) if name == "model_name" else label for name, label in zip(family.labels, told)]
            if family.kind != "histogram":
                self._add(family.name, labels, sample.value)
            elif len(sample.counts) == len(family.bounds) + 1:
                bounds = [*map(floatToGoString, family.bounds), "+Inf"]
                self._add(family.name, labels, list(zip(bounds, accumulate(sample.counts))), sample.value)

    def _own(self, telemetry: Telemetry) -> None:
        role, name = telemetry.role, telemetry.name
        values = {key.removeprefix("wire_"): value for key, value in telemetry.values.items()}
        for key, family in GAUGES.items():
            for value in (values.get(key), values.get(f"worker_{key}")):
                if value is not None:
                    self._add(family, [role, name], value)
        if role == "admin":  # which has neither links nor requests
            return
        for (counted, kind), states in STATES.items():
            if counted == role:
                for state in states:
                    self._add(f"pagewire_{kind}", [name, state], values.get(f"{kind}_{state}", 0.0))
        if role == "worker" and name in self._busy:
            self._add("pagewire_busy_share", [name], self._busy[name])
        self._add("pagewire_stale_messages", [role, name], sum(values.get(key, 0.0) for key in STALE))
        for key, kind in RECOVERIES.items():
            self._add("pagewire_recoveries", [role, name, kind], values.get(key, 0.0))

    def _others(self, telemetry: Telemetry) -> None:
        role = telemetry.role
        for key, value in sorted(telemetry.values.items()):
            kind, _, state = key.partition("_")
            if (role, kind) in STATES and state in STATES[role, kind]:
                continue
            name = f"pagewire_{role}_{_LETTERS.sub('_', key.removeprefix(role + '_'))}"
            if name not in self._found:
                self._found[name] = UnknownMetricFamily(name, f"{key} of a {role}", labels=["name"])
            self._add(name, [telemetry.name], value)
