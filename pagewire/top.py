"""`pagewire top`: what the live page shows, in the terminal, from the admin server's /metrics and /state."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pagewire.finding import admin_option, find_admin
from protocol.options import CONTEXT, Number, run_dir_option

if TYPE_CHECKING:
    from rich.console import RenderableType

Labels = frozenset[tuple[str, str]]
BLOCKS = (("shared", "3", "magenta"), ("used", "2", "red"), ("cached", "1", "yellow"), ("free", "0", "green"))  # as /state counts them
BAR = 24  # characters of a bar of blocks


@dataclass(frozen=True)
class Snapshot:
    """What /metrics said at one moment, the value of each metric's labels, and /state beside it."""

    at: float = 0.0
    values: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)

    def of(self, metric: str, **labels: str) -> float:
        """The sum over all that have these labels; 0 if there are none. A metric's name is said without `pagewire_`."""
        wanted = frozenset(labels.items())
        name = metric if ":" in metric else f"pagewire_{metric}"
        return sum(value for key, value in self.values.get(name, {}).items() if wanted <= key)


def parse(text: str, at: float, state: Mapping[str, Any] | None = None) -> Snapshot:
    """A snapshot of Prometheus' text and /state's object. Raises ValueError for another text."""
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values.setdefault(sample.name.removesuffix("_total"), {})[frozenset(sample.labels.items())] = sample.value
    return Snapshot(at, values, state or {})


def rate(now: Snapshot, before: Snapshot, metric: str) -> float:
    """How much a counter grew per second; 0 if a service began anew."""
    seconds = now.at - before.at
    return max(0.0, now.of(metric) - before.of(metric)) / seconds if seconds > 0 and before.values else 0.0


def busy(now: Snapshot, before: Snapshot, worker: str) -> float:
    """The share of the last interval's steps in a worker's time; 0 without a step."""
    step, idle = (now.of(name, name=worker) - before.of(name, name=worker) for name in ("worker_step_seconds", "worker_idle_seconds"))
    return step / (step + idle) if step > 0 and idle >= 0 else 0.0


def screen(now: Snapshot, before: Snapshot, where: str, problem: str = "") -> RenderableType:
    """The whole picture. problem: why there is no newer one."""
    from rich.console import Group
    from rich.text import Text

    title = Text.assemble(("pagewire top", "bold"), f"  {where}  ", time.strftime("%H:%M:%S"), ("   q leaves", "dim"))
    if problem:
        title.append(f"\n{problem}", "bold red")
    if not now.values:
        return title
    parts = (_speed(now, before), _latency(now), _services(now, before), Text("blocks", "bold"))
    return Group(title, *(piece for part in parts for piece in (Text(), part)), *_blocks(now))


def _speed(now: Snapshot, before: Snapshot) -> RenderableType:
    from rich.table import Table

    hits, queries = now.of("scheduler_prefix_hits"), now.of("scheduler_prefix_queries")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("tok/s out", "tok/s in", "waiting", "running", "finished", "failed", "preempted", "hit rate"):
        table.add_column(name, justify="right", no_wrap=True)
    requests = (f"{now.of('requests', status=status):,.0f}" for status in ("waiting", "running", "finished", "failed"))
    table.add_row(
        f"[bold]{rate(now, before, 'vllm:generation_tokens'):,.0f}[/]",
        f"{rate(now, before, 'vllm:prompt_tokens'):,.0f}",
        *requests,
        f"{now.of('scheduler_preemptions'):,.0f}",
        f"{hits / queries:.0%}" if queries else "–",
    )
    return table


def _latency(now: Snapshot) -> RenderableType:
    """Of the last minute, the shares of the last seconds: what the live page calls so."""
    from rich.table import Table

    minute, recent, totals = (now.state.get(part, {}) for part in ("minute", "now", "totals"))
    shown = {
        "TTFT": _duration(minute.get("time_to_first_token", 0.0)),
        "TPOT": _duration(minute.get("time_per_output_token", 0.0)),
        "plans": f"{totals.get('plans_in_flight', 0):.0f}",
        "depth": f"{totals.get('depth', 0):.0f}",
        "busy": f"{recent['busy_share']:.0%}" if recent.get("busy_share") else "–",
        "device in use": f"{recent.get('gpu_utilization', 0.0):.0%}",
        "blocks in use": f"{recent.get('memory_usage', 0.0):.0%}",
    }
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*shown.values())
    return table


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms" if seconds else "–"


def _services(now: Snapshot, before: Snapshot) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("service", "role", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("epoch", "memory", "trip", "busy", "plans", "steps/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for key in sorted(now.values.get("pagewire_service", {}), key=sorted):
        labels = dict(key)
        name, role, state = labels["name"], labels["role"], labels["state"]
        epoch = now.of(f"{role}_epoch", name=name)
        memory = now.of(f"{role}_memory_bytes", name=name)
        trip = now.of(f"{role}_link_round_trip_seconds", name=name)
        row = [f"{epoch:.0f}" if epoch else "", f"{memory / 2**20:,.0f} MiB" if memory else "", _duration(trip) if trip else "", "", "", ""]
        if role == "worker":
            steps = now.of("worker_steps", name=name) - before.of("worker_steps", name=name)
            per_second = max(0.0, steps) / max(now.at - before.at, 1e-9) if before.values else 0.0
            row[3:] = [f"{busy(now, before, name):.0%}", f"{now.of('worker_plans_in_flight', name=name):.0f}", f"{per_second:,.0f}"]
        table.add_row(name, role, Text(state, "green" if state == "ready" else "yellow"), *row)
    return table


def _blocks(now: Snapshot) -> Iterator[RenderableType]:
    from rich.text import Text

    for worker in now.state.get("blocks", ()):
        cells, stride = worker["cells"], worker["stride"]
        counts = [cells.count(digit) for _, digit, _ in BLOCKS]
        line = Text(f"{worker['worker']}  ", overflow="ellipsis", no_wrap=True)
        shown = 0
        for i, ((_, _, colour), count) in enumerate(zip(BLOCKS, counts, strict=True)):
            width = BAR - shown if i == len(BLOCKS) - 1 else min(BAR - shown, -(-count * BAR // len(cells)))
            shown += width
            line.append("█" * width, colour)
        told = " ".join(f"{count * stride:,} {name}" for (name, _, _), count in zip(BLOCKS, counts, strict=True))
        line.append(("  ≈ " if stride > 1 else "  ") + told)  # beyond 1024 blocks /state has a sample
        yield line


@click.command(context_settings=CONTEXT)
@admin_option
@run_dir_option
@click.option("--interval", type=Number(0.1, 3600), default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Print the picture after two looks and leave; no terminal is needed.")
def main(admin: str, run_dir: Path, interval: float, once: bool) -> None:
    """Watch a running stack in the terminal."""
    admin = find_admin(admin, run_dir)
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        raise click.ClickException("`pagewire top` needs rich: install pagewire[tui]") from None
    console = Console()
    before = _look(admin)
    if once:
        time.sleep(interval)
        console.print(screen(_look(admin), before, admin))
        return
    if not (sys.stdin.isatty() and console.is_terminal):
        raise click.ClickException("no terminal; `--once` prints the picture")
    now, problem = before, ""
    with _keys() as pressed, Live(screen(now, Snapshot(), admin), console=console, screen=True, auto_refresh=False) as live:
        live.refresh()
        while not pressed(interval):
            try:
                newer = _look(admin)
                before, now, problem = now, newer, ""
            except click.ClickException as error:
                problem = error.message
            live.update(screen(now, before, admin, problem), refresh=True)


def _look(admin: str) -> Snapshot:
    metrics, at, state = _get(admin, "/metrics"), time.monotonic(), _get(admin, "/state")
    try:
        return parse(metrics.decode(), at, json.loads(state))
    except ValueError as error:
        raise click.ClickException(f"{admin} is no admin server: {error}") from None


def _get(admin: str, path: str) -> bytes:
    address = admin.rstrip("/") + path
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            content: bytes = answer.read()
            return content
    except (OSError, http.client.HTTPException) as error:
        raise click.ClickException(f"cannot reach {address}: {getattr(error, 'reason', error)}; is `pagewire up` running?") from None


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits some seconds and says whether the user wants to leave: q, Ctrl-C or Ctrl-D."""
    import termios
    import tty

    fd = sys.stdin.fileno()
    kept = termios.tcgetattr(fd)
    tty.setcbreak(fd)

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([fd], [], [], left)[0]:
                keys = os.read(fd, 64)
                if not keys or any(key in b"qQ\x03\x04" for key in keys):
                    return True
        return False

    try:
        yield pressed
    except KeyboardInterrupt:
        pass
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, kept)
