"""Telemetry as Prometheus text."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric, UnknownMetricFamily

from protocol.rundir import ServiceRecord
from protocol.telemetry import Telemetry

FORGET = 10.0  # seconds without figures after which a service is no longer shown
STATUSES = ("waiting", "running", "finished", "failed", "aborted")  # of requests
BLOCK_STATES = ("free", "cached", "used")
_LETTERS = re.compile("[^a-zA-Z0-9_]")


class Figures:
    """The latest figures of every service; gauges are what the services said last."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, Telemetry]] = {}

    def take(self, telemetry: Telemetry, now: float) -> None:
        """Take what a service published. The newest message of a name wins, so a new incarnation replaces the old one."""
        self._latest[telemetry.name] = (now, telemetry)

    def current(self, now: float) -> list[Telemetry]:
        """The figures of the services heard lately."""
        self._latest = {name: entry for name, entry in self._latest.items() if now - entry[0] < FORGET}
        return [telemetry for _, telemetry in self._latest.values()]

    def text(self, services: list[ServiceRecord], now: float | None = None) -> bytes:
        """The exposition format, of these figures and of the services found running."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(self.current(time.monotonic() if now is None else now), services))
        return generate_latest(registry)


class _Families:
    """Figures by metric: requests and blocks by state, anything else under its own name and its service's role."""

    def __init__(self, current: list[Telemetry], services: list[ServiceRecord]) -> None:
        self._current = current
        self._services = services

    def collect(self) -> Iterator[Metric]:
        requests = GaugeMetricFamily("pagewire_requests", "Requests of a frontend by status", labels=["name", "status"])
        blocks = GaugeMetricFamily("pagewire_blocks", "KV blocks of all workers by state", labels=["name", "state"])
        others: dict[str, UnknownMetricFamily] = {}
        for telemetry in self._current:
            for key, value in sorted(telemetry.values.items()):
                kind, _, state = key.partition("_")
                if kind == "requests" and state in STATUSES and telemetry.role == "frontend":
                    requests.add_metric([telemetry.name, state], value)
                elif kind == "blocks" and state in BLOCK_STATES:
                    blocks.add_metric([telemetry.name, state], value)
                else:
                    name = f"pagewire_{telemetry.role}_{_LETTERS.sub('_', key.removeprefix(telemetry.role + '_'))}"
                    family = others.setdefault(name, UnknownMetricFamily(name, f"{key} of a {telemetry.role}", labels=["name"]))
                    family.add_metric([telemetry.name], value)
        running = GaugeMetricFamily("pagewire_service", "1 for each running service", labels=["role", "name", "state"])
        for service in self._services:
            running.add_metric([service.role, service.name, service.state], 1)
        yield from (requests, blocks, running, *others.values())
