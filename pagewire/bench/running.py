"""One measurement of `pagewire bench`: from its options to a workload, the runs of it, and what is kept of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pagewire.bench.clients import ClientDied, Target, measure
from pagewire.bench.exchange import Record
from pagewire.bench.figures import figures
from pagewire.bench.plots import NoPlots, check, plot, records_of
from pagewire.bench.report import ReportError, comparison, differences, read_last_run, read_result, table
from pagewire.bench.workloads import Request, Workload, WorkloadError, make, read_lengths
from pagewire.finding import find_api
from protocol.options import Usage

Runs = list[tuple[list[Record], dict[str, Any]]]  # of each run, what became of its requests, and the figures of these


def prepare(options: dict[str, Any]) -> tuple[Target, Workload]:
    """What is asked, and whom. Raises Usage and ClickException, one line each."""
    try:
        if options["plot_path"]:
            check(options["plot_path"])
    except NoPlots as error:
        raise Usage(str(error)) from None
    url = find_api(options["url"], options["run_dir"]).rstrip("/").removesuffix("/v1")
    model = options["model"] or _first_model(url, options["api_key"])
    names = {name for name in Workload.__dataclass_fields__ if name in options}
    try:
        lengths = read_lengths(options["lengths"]) if options.get("lengths") else ()
    except WorkloadError as error:
        raise Usage(str(error)) from None
    text = options["prompts"] == "text" or options.get("kind") == "multi-turn"
    workload = Workload(**{name: options[name] for name in names - {"model", "lengths"}}, model=model, lengths=lengths, text=text)
    path = "/v1/chat/completions" if options["api"] == "chat" else "/v1/completions"
    return Target(url, path, options["api_key"], workload.stream), workload


def _first_model(url: str, key: str) -> str:
    """The first model that the server lists; none if it lists none."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except urllib.error.HTTPError:
        return ""
    except (ValueError, LookupError, TypeError):
        return ""
    except (OSError, http.client.HTTPException) as error:
        raise click.ClickException(f"cannot reach {url}: {str(getattr(error, 'reason', error)).strip()}") from None


def workload_requests(workload: Workload) -> list[Request]:
    """A workload's requests. Raises Usage if there can be none of the kind."""
    try:
        return make(workload)
    except WorkloadError as error:
        raise Usage(str(error)) from None


def measure_and_report(
    target: Target, requests: list[Request], options: dict[str, Any], concurrency: int, goodput: dict[str, float]
) -> None:
    """Every run of the requests: print its figures, keep them, and exit with 1 if a request failed."""
    runs = []
    for run in range(options["repeat"]):
        label = f"run {run + 1}" if options["repeat"] > 1 else "requests"
        records = run_once(target, requests, options, concurrency, label)
        runs.append((records, figures(records, goodput, options["percentiles"])))
        if options["repeat"] > 1:
            click.echo(label)
        click.echo(table(runs[-1][1]))
    save(options, runs, {"url": target.url, "concurrency": concurrency, "goodput": goodput})
    fail_if_any(runs)


def run_once(target: Target, requests: list[Request], options: dict[str, Any], concurrency: int, label: str) -> list[Record]:
    """Measure once, with a progress bar if somebody looks."""
    total = sum(1 + len(request.then) for request in requests)
    with _bar(label, total) as advance:
        try:
            return measure(target, requests, options["processes"], concurrency, advance)
        except ClientDied as error:
            raise click.ClickException(str(error)) from None


@contextlib.contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if that is a terminal and rich is there; yields what moves it."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        yield lambda ended: None
        return
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda ended: progress.advance(task, ended)


def save(options: dict[str, Any], runs: Runs, more: dict[str, Any]) -> None:
    """Write and draw what was asked for. `more`: settings beyond the options."""
    if path := options["json_path"]:
        hidden = ("api_key", "run_dir", "json_path", "plot_path", "compare")
        kept = {key: str(value) if isinstance(value, Path) else value for key, value in options.items() if key not in hidden}
        results = [found | {"records": [asdict(record) for record in records]} for records, found in runs]
        path.write_text(json.dumps({"settings": kept | more, "runs": results}))
    _plot(options, {f"run {i + 1}": records for i, (records, _) in enumerate(runs)})


def _plot(options: dict[str, Any], runs: dict[str, list[Record]]) -> None:
    if options["plot_path"]:
        try:
            plot(runs, options["plot_path"])
        except (NoPlots, OSError, ValueError) as error:
            raise click.ClickException(str(error)) from None


def compared(options: dict[str, Any]) -> bool:
    """Print the comparison that was asked for instead of a measurement."""
    if not options["compare"]:
        return False
    a, b = options["compare"]
    try:
        click.echo(comparison(read_result(a), read_result(b), (a.name, b.name)))
        for line in differences(a, b):
            click.echo(line)
        if options["plot_path"]:
            _plot(options, {path.name: records_of(read_last_run(path)) for path in (a, b)})
    except ReportError as error:
        raise Usage(str(error)) from None
    return True


def fail_if_any(runs: Runs) -> None:
    """Exit with 1 if a request failed."""
    if any(found["failed"] for _, found in runs):
        raise SystemExit(1)
