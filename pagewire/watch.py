"""What the live page shows, as JSON: services, speed, requests and blocks at this moment."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from pagewire.metrics import Figures
from pagewire.monitor import Monitor
from protocol.registration import ServiceRecord

MISSED = 30.0  # seconds for which a service that has gone is still shown
RECENT = 4.0  # seconds that "now" stands for
EVENTS = 20  # deaths and returns that are remembered


class Watch:
    """Follows the services' coming and going. `picture` is called about once a second."""

    def __init__(self, figures: Figures, monitor: Monitor) -> None:
        self._figures = figures
        self._monitor = monitor
        self._seen: dict[str, tuple[float, ServiceRecord]] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)

    def look(self, records: list[ServiceRecord], now: float) -> None:
        """Note who is there."""
        first = not self._seen  # whoever is there then was there before
        here = {record.name: record for record in records}
        for name, record in here.items():
            known = self._seen.get(name)
            if known is not None and known[1].pid != record.pid:
                if known[1].state != "gone":
                    self._event(known[1], "died")
                self._event(record, "was started again")
            elif known is None and not first:
                self._event(record, "appeared")
            self._seen[name] = (now, record)
        for name, (at, record) in list(self._seen.items()):
            if name in here:
                continue
            if record.state != "gone":
                self._event(record, "has gone")
                self._seen[name] = (now, ServiceRecord(record.role, name, record.pid, record.incarnation, "gone", record.started))
            elif now - at > MISSED:
                del self._seen[name]

    def picture(self, now: float) -> dict[str, Any]:
        """Everything, in one object; numbers are in seconds, bytes, tokens and shares of 1."""
        current = {telemetry.name: telemetry for telemetry in self._figures.current(now)}
        totals: dict[str, float] = {}
        blocks = []
        for telemetry in current.values():
            if telemetry.role == "scheduler":
                for key, value in telemetry.values.items():
                    totals[key] = totals.get(key, 0.0) + value
                blocks += [
                    {"worker": name, "stride": int.from_bytes(drawn[:4], "little"), "cells": drawn[4:].hex()[1::2]}
                    for name, drawn in sorted(telemetry.pictures.items())
                ]
        services = []
        order = {"frontend": 0, "scheduler": 1, "worker": 2}
        for name, (_, record) in sorted(self._seen.items(), key=lambda item: (order.get(item[1][1].role, 3), item[0])):
            said = current.get(name)
            values = said.values if said is not None and said.incarnation == record.incarnation else {}
            services.append(
                {
                    "role": record.role,
                    "name": name,
                    "pid": record.pid,
                    "state": record.state,
                    "memory_bytes": values.get("memory_bytes"),
                    "epoch": values.get("epoch"),
                    "round_trip": values.get("worker_link_round_trip_seconds") or values.get("link_round_trip_seconds"),
                    "plans_in_flight": values.get("worker_plans_in_flight", values.get("plans_in_flight")),
                }
            )
        wanted = ("requests_waiting", "requests_running", "requests_finished", "requests_failed", "preemptions", "prefix_hits")
        return {
            "time": time.time(),
            "services": services,
            "now": self._monitor.figures(RECENT),
            "minute": self._monitor.figures(),
            "totals": {key: totals.get(key, 0.0) for key in (*wanted, "prefix_queries", "plans_in_flight", "depth", "swaps_out")},
            "blocks": blocks,
            "events": list(self._events),
        }

    def _event(self, record: ServiceRecord, what: str) -> None:
        self._events.appendleft({"time": time.time(), "text": f"{record.name} (pid {record.pid}) {what}"})
