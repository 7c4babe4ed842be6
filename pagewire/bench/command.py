"""`pagewire bench serve|throughput|latency`: any OpenAI-compatible server, measured from outside."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pagewire.bench.clients import ClientDied, Target, measure
from pagewire.bench.exchange import Record
from pagewire.bench.figures import OBJECTIVES, figures
from pagewire.bench.plots import NoPlots, plot, records_of
from pagewire.bench.report import ReportError, comparison, read_result, table
from pagewire.bench.workloads import KINDS, Request, Workload, WorkloadError, make, read_lengths
from protocol.options import CONTEXT, Usage


def span(context: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    """A number, or LOW:HIGH."""
    low, _, high = value.partition(":")
    if not low.isdecimal() or not (high or low).isdecimal():
        raise click.BadParameter(f"{value!r} is neither a number nor LOW:HIGH", context, param)
    return int(low), int(high or low)


def objectives(context: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    """Milliseconds by metric, from ttft:200 and the like."""
    found = {}
    for value in values:
        metric, _, limit = value.partition(":")
        try:
            found[metric] = float(limit)
        except ValueError:
            metric = ""
        if metric not in OBJECTIVES:
            raise click.BadParameter(f"{value!r} is not METRIC:MS with a metric of {', '.join(OBJECTIVES)}", context, param)
    return found


def percents(context: click.Context, param: click.Parameter, value: str) -> list[float]:
    """Percentiles, separated by commas."""
    try:
        found = [float(part) for part in value.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= percent <= 100 for percent in found):
        raise click.BadParameter(f"{value!r} is no list of percentiles such as 50,90,99", context, param)
    return found


SERVER = [
    click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the server's /v1 is."),
    click.option("--model", default="", show_default="the server's first", help="Name of the model in requests."),
    click.option("--api-key", default="", envvar="OPENAI_API_KEY", help="Sent as a bearer token."),
    click.option("--api", type=click.Choice(("completions", "chat")), default="completions", show_default=True, help="Which API is asked."),
    click.option("--processes", type=click.IntRange(1), default=2, show_default=True, help="Client processes."),
]
PROMPTS = [
    click.option(
        "--prompts", type=click.Choice(("ids", "text")), default="ids", show_default=True, help="Token ids, or words (chat: always)."
    ),
    click.option("--vocab", type=click.IntRange(1), default=10_000, show_default=True, help="Token ids are drawn below this."),
    click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="Of sampling."),
    click.option("--ignore-eos", is_flag=True, help="Ask for outputs of full length (not every server knows this)."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of prompts, lengths and arrivals."),
]
OUTPUT = [
    click.option(
        "--repeat", type=click.IntRange(1), default=1, show_default=True, help="Runs of the same requests, the later ones cached."
    ),
    click.option(
        "--metric-percentiles", "percentiles", callback=percents, default="50,90,99", show_default=True, help="Which are printed."
    ),
    click.option(
        "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures, and each request's, here."
    ),
    click.option(
        "--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Draw the distributions and the throughput here."
    ),
    click.option(
        "--compare",
        type=(click.Path(exists=True, path_type=Path), click.Path(exists=True, path_type=Path)),
        metavar="A.json B.json",
        help="Measure nothing: print two results beside one another (and --plot them).",
    ),
]
LENGTHS = [
    click.option(
        "--dataset-name", "--workload", "kind", type=click.Choice(KINDS), default="random", show_default=True, help="What is asked."
    ),
    click.option(
        "--num-prompts",
        "--requests",
        "requests",
        type=click.IntRange(1),
        default=100,
        show_default=True,
        help="Requests, or conversations.",
    ),
    click.option(
        "--input", "--input-len", "input", callback=span, default="100:1024", show_default=True, metavar="LOW:HIGH", help="Prompt lengths."
    ),
    click.option(
        "--output",
        "--output-len",
        "output",
        callback=span,
        default="100:1024",
        show_default=True,
        metavar="LOW:HIGH",
        help="Output lengths.",
    ),
    click.option("--lengths", type=click.Path(exists=True, path_type=Path), help="JSON list of [prompt, output] lengths to take instead."),
    click.option(
        "--max-total", type=click.IntRange(1), default=4000, show_default=True, help="Of --lengths, pairs of at most so many tokens."
    ),
    click.option(
        "--shared-prefix", "prefix", type=click.IntRange(0), default=0, help="Tokens that prompts begin with, on top of their length."
    ),
    click.option("--prefixes", type=click.IntRange(1), default=1, show_default=True, help="Different ones of these."),
    click.option("--turns", type=click.IntRange(1), default=4, show_default=True, help="Of each conversation of multi-turn."),
]


def with_options(*groups: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Decorate a command with lists of options."""

    def decorate(function: Any) -> Any:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


@click.group(context_settings=CONTEXT)
def main() -> None:
    """Measure an OpenAI-compatible server from outside.

    Figures have the names and definitions of vLLM's bench: TTFT, TPOT, ITL, E2EL, goodput.
    """


@main.command()
@with_options(SERVER, LENGTHS, PROMPTS)
@click.option(
    "--request-rate",
    "--rate",
    "rate",
    type=click.FloatRange(0),
    default=0.0,
    show_default="all at once",
    help="Requests/s (inf: all at once).",
)
@click.option(
    "--arrivals", type=click.Choice(("poisson", "even", "burst")), default="poisson", show_default=True, help="When, at that rate."
)
@click.option(
    "--burstiness",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="1: Poisson; below: bunched; above: evener.",
)
@click.option("--seconds", type=click.FloatRange(0), default=0.0, show_default="all", help="Only what arrives within so many seconds.")
@click.option(
    "--max-concurrency", "--concurrency", "concurrency", type=click.IntRange(0), default=0, show_default="no bound", help="Most under way."
)
@click.option("--no-stream", "stream", is_flag=True, default=True, flag_value=False, help="Ask for whole answers.")
@click.option("--warmup", type=click.IntRange(0), default=0, help="Requests sent beforehand and not counted.")
@click.option("--goodput", multiple=True, callback=objectives, metavar="METRIC:MS", help="An objective, such as ttft:200; may be repeated.")
@with_options(OUTPUT)
def serve(arrivals: str, concurrency: int, warmup: int, goodput: dict[str, float], **options: Any) -> None:
    """Online: requests arrive at a rate, answers are streamed, who waits how long?"""
    if _compared(options):
        return
    burstiness = {"poisson": options["burstiness"], "even": float("inf"), "burst": options["burstiness"]}[arrivals]
    if arrivals == "burst":
        options["rate"] = 0.0
    options["burstiness"] = burstiness
    target, workload = _prepare(options)
    requests = _make(workload)
    if warmup:
        _run(target, [Request(0.0, request.body) for request in requests[:warmup]], options, concurrency, "warm-up")
    _measure(target, requests, options, concurrency, goodput)


@main.command()
@with_options(SERVER, LENGTHS, PROMPTS, OUTPUT)
def throughput(**options: Any) -> None:
    """All requests at once, whole answers: how much comes out?"""
    if _compared(options):
        return
    target, workload = _prepare(options | {"stream": False})
    _measure(target, _make(workload), options, 0, {})


@main.command()
@with_options(SERVER)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Requests of one batch, sent together.")
@click.option("--input-len", type=click.IntRange(1), default=32, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens of each output.")
@click.option("--num-iters-warmup", type=click.IntRange(0), default=2, show_default=True, help="Batches that are not counted.")
@click.option("--num-iters", type=click.IntRange(1), default=10, show_default=True, help="Batches that are.")
@with_options(PROMPTS, [option for option in OUTPUT if option is not OUTPUT[0]])
def latency(batch_size: int, input_len: int, output_len: int, num_iters: int, num_iters_warmup: int, **options: Any) -> None:
    """Batches of equal requests, one after another: how long does a batch take?

    Of the same prompts each time, so all but the first find them cached.
    """
    if _compared(options):
        return
    sizes = {"requests": batch_size, "input": (input_len, input_len), "output": (output_len, output_len), "repeat": 1}
    target, workload = _prepare(options | sizes | {"kind": "random"})
    requests = _make(workload)
    for i in range(num_iters_warmup):
        _run(target, requests, options, 0, f"warm-up {i + 1}/{num_iters_warmup}")
    runs = []
    for i in range(num_iters):
        records = _run(target, requests, options, 0, f"batch {i + 1}/{num_iters}")
        runs.append((records, figures(records, percentiles=options["percentiles"])))
    batches = [
        Record(0.0, first=found["duration"], last=found["duration"], error="" if not found["failed"] else "failed") for _, found in runs
    ]
    together = figures(batches, percentiles=options["percentiles"])
    click.echo(f"batches of {batch_size}, {input_len} tokens in and {output_len} out: mean {together['mean_e2el_ms']:.1f} ms")
    click.echo("   ".join(f"p{percent:g} {together[f'p{percent:g}_e2el_ms']:.1f} ms" for percent in options["percentiles"]))
    _save(
        options, runs, {"batch_size": batch_size, "input_len": input_len, "output_len": output_len, "latency_ms": together["mean_e2el_ms"]}
    )
    _fail_if_any(runs)


# ---------------------------------------------------------------- what they share


def _prepare(options: dict[str, Any]) -> tuple[Target, Workload]:
    url = options["url"].rstrip("/").removesuffix("/v1")
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
    except OSError as error:
        raise click.ClickException(f"cannot reach {url}: {getattr(error, 'reason', error)}") from None


def _make(workload: Workload) -> list[Request]:
    try:
        return make(workload)
    except WorkloadError as error:
        raise Usage(str(error)) from None


def _measure(target: Target, requests: list[Request], options: dict[str, Any], concurrency: int, goodput: dict[str, float]) -> None:
    runs = []
    for run in range(options["repeat"]):
        label = f"run {run + 1}" if options["repeat"] > 1 else "requests"
        records = _run(target, requests, options, concurrency, label)
        runs.append((records, figures(records, goodput, options["percentiles"])))
        if options["repeat"] > 1:
            click.echo(label)
        click.echo(table(runs[-1][1]))
    _save(options, runs, {"concurrency": concurrency, "goodput": goodput})
    _fail_if_any(runs)


def _run(target: Target, requests: list[Request], options: dict[str, Any], concurrency: int, label: str) -> list[Record]:
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


def _save(options: dict[str, Any], runs: list[tuple[list[Record], dict[str, Any]]], more: dict[str, Any]) -> None:
    if path := options["json_path"]:
        hidden = ("api_key", "json_path", "plot_path", "compare")
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


def _compared(options: dict[str, Any]) -> bool:
    """Print the comparison that was asked for instead of a measurement."""
    if not options["compare"]:
        return False
    a, b = options["compare"]
    try:
        click.echo(comparison(read_result(a), read_result(b), (a.name, b.name)))
    except ReportError as error:
        raise Usage(str(error)) from None
    if options["plot_path"]:
        _plot(options, {path.name: records_of(json.loads(path.read_text())["runs"][-1]) for path in (a, b)})
    return True


def _fail_if_any(runs: list[tuple[list[Record], dict[str, Any]]]) -> None:
    if any(found["failed"] for _, found in runs):
        raise SystemExit(1)
