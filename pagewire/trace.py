"""`pagewire trace`: the services' spans as one timeline, in the format that Perfetto and Chrome's tracing page open.

Every service notes times of its own monotonic clock. What is known of one clock against the scheduler's follows from
cause and effect: a plan is received after it was sent, a result taken after it was sent. So each link bounds the
offset from both sides; where 0 lies between the bounds, as on one host, the clocks are one, else the middle is taken.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import click

from pagewire.finding import admin_option, find_admin
from protocol.options import CONTEXT, Number, Output, run_dir_option
from protocol.trace import Span, Spans

# (name at the one end, name at the other): the first begins before the second ends, both of one key
TO_SCHEDULER = {"worker": ("answer", "result"), "frontend": ("request", "queue")}
FROM_SCHEDULER = {"worker": ("send", "receive"), "frontend": ("queue", "first token")}
ORDER = {"frontend": 0, "scheduler": 1, "worker": 2}


@dataclass
class Service:
    """One incarnation of a service and what it noted, in its own clock."""

    role: str
    name: str
    pid: int
    spans: list[Span] = field(default_factory=list)
    lost: int = 0
    offset: float = 0.0  # seconds that its clock is ahead of the scheduler's
    bounds: tuple[float, float] = (-inf, inf)


def services(messages: Iterable[Spans]) -> list[Service]:
    """The spans by incarnation, frontends first, with clock offsets estimated."""
    found: dict[tuple[str, int], Service] = {}
    for message in messages:
        service = found.setdefault((message.name, message.incarnation), Service(message.role, message.name, message.pid))
        service.spans += message.spans
        service.lost += message.lost
    ordered = sorted(found.values(), key=lambda service: (ORDER.get(service.role, 3), service.name))
    schedulers = [span for service in ordered if service.role == "scheduler" for span in service.spans]
    for service in ordered:
        if service.role in TO_SCHEDULER:
            service.bounds = clock_bounds(service, schedulers)
            service.offset = offset(*service.bounds)
    return ordered


def clock_bounds(service: Service, scheduler: Sequence[Span]) -> tuple[float, float]:
    """The least and the most that a service's clock can be ahead of the scheduler's, in seconds, by cause and effect."""
    sent, taken = TO_SCHEDULER[service.role]
    begun, received = FROM_SCHEDULER[service.role]
    takes = {span.key: span.end for span in scheduler if span.name == taken}
    sends = {span.key: span.begin if begun == "send" else span.end for span in scheduler if span.name == begun}
    least = max((span.begin - takes[span.key] for span in service.spans if span.name == sent and span.key in takes), default=-inf)
    most = min((span.end - sends[span.key] for span in service.spans if span.name == received and span.key in sends), default=inf)
    return least, most


def offset(least: float, most: float) -> float:
    """The likeliest offset within the bounds: none if they allow it, else their middle, or the only one known."""
    if least <= 0 <= most:
        return 0.0
    return least if most == inf else most if least == -inf else (least + most) / 2


def chrome(found: Sequence[Service], begin: float, end: float) -> dict[str, Any]:
    """The trace of `begin` to `end`, seconds of the scheduler's clock, as Chrome's JSON object format."""
    events: list[dict[str, Any]] = []
    for number, service in enumerate(found, 1):
        name = f"{service.name} ({service.pid})"
        events.append({"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": number, "tid": 0, "args": {"sort_index": number}})
        lanes: dict[str, int] = {}
        for span in sorted(service.spans, key=lambda span: span.begin):
            first, last = max(begin, span.begin - service.offset), min(end, span.end - service.offset)
            if last < first:
                continue
            asynchronous = span.name in ("queue", "request", "tokenize")  # many at once: no stack
            if span.lane not in lanes:
                lanes[span.lane] = len(lanes) + 1
                events.append({"ph": "M", "name": "thread_name", "pid": number, "tid": lanes[span.lane], "args": {"name": span.lane}})
            event = {"name": span.name, "cat": service.role, "pid": number, "tid": lanes[span.lane], "ts": round((first - begin) * 1e6, 3)}
            if span.key:
                event["args"] = {"key": span.key, **_step(span.key)}
            if asynchronous:
                ident = f"{number}.{len(events)}"
                events.append({**event, "ph": "b", "id": ident})
                events.append({**event, "ph": "e", "id": ident, "ts": round((last - begin) * 1e6, 3)})
            else:
                events.append({**event, "ph": "X", "dur": round((last - first) * 1e6, 3)})
    about = {
        "seconds": end - begin,
        "busy_share": {service.name: busy_share(service, begin, end) for service in found if service.role == "worker"},
        "clock_offset_seconds": {service.name: service.offset for service in found},
        "spans_lost": sum(service.lost for service in found),
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def busy_share(worker: Service, begin: float, end: float) -> float:
    """The share of the time in which the worker's device ran a step."""
    busy, until = 0.0, begin
    for first, last in sorted((span.begin - worker.offset, span.end - worker.offset) for span in worker.spans if span.name == "forward"):
        first, last = max(first, until), min(last, end)
        if last > first:
            busy += last - first
            until = last
    return busy / (end - begin)


def _step(key: str) -> Mapping[str, int]:
    _, _, step = key.partition(":")
    return {"step": int(step)} if step else {}


def _refusal(error: urllib.error.HTTPError) -> str:
    """What the server said; its status if it was nothing of an admin server's."""
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return f"status {error.code} {error.reason}"


@click.command(context_settings=CONTEXT)
@admin_option
@run_dir_option
@click.option("--seconds", type=Number(0.1, 60), default=5.0, show_default=True, help="How long to watch.")
@click.option("--output", type=Output(), required=True, help="File to write, for ui.perfetto.dev.")
def main(admin: str, run_dir: Path, seconds: float, output: Path) -> None:
    """Record a timeline of all services.

    Opens in Perfetto (ui.perfetto.dev) and in Chrome (chrome://tracing).
    """
    address = f"{find_admin(admin, run_dir).rstrip('/')}/trace?seconds={seconds:g}"
    try:
        with urllib.request.urlopen(address, timeout=seconds + 30) as answer:
            trace = json.load(answer)
        about = trace["otherData"]
    except urllib.error.HTTPError as error:
        raise click.ClickException(f"{address}: {_refusal(error)}") from None
    except (ValueError, LookupError, TypeError):
        raise click.ClickException(f"{address} gives no trace: is an admin server there?") from None
    except (OSError, http.client.HTTPException) as error:
        raise click.ClickException(
            f"cannot reach {address}: {str(getattr(error, 'reason', error)).strip()}; is `pagewire up` running?"
        ) from None
    output.write_text(json.dumps(trace))
    click.echo(f"{len(trace['traceEvents'])} events of {about['seconds']:.1f} s in {output}")
    for name, share in about["busy_share"].items():
        click.echo(f"{name}: device busy {share:.1%} of the time")
    if about["spans_lost"]:
        click.echo(f"{about['spans_lost']} spans were too many and are not in it")
