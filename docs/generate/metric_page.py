"""The page of metrics: families with labels, figures of each service, and counted events."""

from __future__ import annotations

from collections.abc import Iterable

from figure_texts import EVENTS, FIGURES
from pagewire.metrics import OWN
from protocol.families import FAMILIES, Family
from tables import code, table

INTRO = """# Metrics

Everything that `http://127.0.0.1:8001/metrics` shows, in Prometheus' text format; made from the code (`make docs`).
Counters begin at 0 when their service starts. A service that has not been heard for ten seconds is no longer shown.

What means the same as in vLLM has vLLM's name, so its dashboards work; the rest begins with `pagewire_`.
"""

EVENTS_TEXT = """## Counted events

Whatever is refused, repeated, stale or unexpected is counted, and shown once it has happened: `pagewire_frontend_NAME`,
`pagewire_scheduler_wire_NAME`, `pagewire_worker_wire_NAME`. In a healthy stack most of them stay away; a few grow with each start, drain or
lost connection."""


def metrics_page() -> str:
    """Markdown of all metrics."""
    lines = [INTRO, "## With vLLM's names", "", *_families(f for f in FAMILIES.values() if not f.name.startswith("pagewire_")), ""]
    ours = [*OWN.values(), *(f for f in FAMILIES.values() if f.name.startswith("pagewire_"))]
    lines += ["## With labels of ours", "", *_families(ours), ""]
    for role, figures in FIGURES.items():
        rows = [(code(f"pagewire_{role}_{name}"), text) for name, text in figures.items()]
        lines += [f"## Of {'an' if role == 'admin' else 'a'} {role}", "", "With the label `name`.", "", *table(("metric", ""), rows), ""]
    rows = [(code(name), text) for name, text in sorted(EVENTS.items())]
    lines += [EVENTS_TEXT, "", *table(("event", ""), rows), ""]
    return "\n".join(lines)


def _families(families: Iterable[Family]) -> list[str]:
    rows = []
    for family in families:
        name = f"{family.name}_total" if family.kind == "counter" else family.name
        rows.append((code(name), family.kind, ", ".join(map(code, family.labels)), family.help))
    return table(("metric", "kind", "labels", ""), rows)
