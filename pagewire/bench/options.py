"""The options of `pagewire bench`, in the groups that its commands share, and how their values are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from pagewire.bench.figures import OBJECTIVES
from pagewire.bench.workloads import KINDS
from pagewire.finding import api_option
from protocol.options import Number, Output, run_dir_option


def span(context: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    """A number, or LOW:HIGH."""
    low, _, high = value.partition(":")
    if not low.isdecimal() or not (high or low).isdecimal():
        raise click.BadParameter(f"{value!r} is neither a number nor LOW:HIGH", context, param)
    return int(low), int(high or low)


def some(context: click.Context, param: click.Parameter, value: float | None) -> float:
    """A rate or a span of time; 0 stands for no bound, which is what infinity and leaving it out mean."""
    return 0.0 if value is None or math.isinf(value) else value


def objectives(context: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    """Milliseconds by metric, from ttft:200 and the like."""
    found = {}
    for value in values:
        metric, _, limit = value.partition(":")
        try:
            found[metric] = float(limit)
        except ValueError:
            metric = ""
        if metric not in OBJECTIVES or not found[metric] > 0:
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
    api_option,
    run_dir_option,
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
    click.option("--temperature", type=Number(0), default=0.0, show_default=True, help="Of sampling."),
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
    click.option("--json", "json_path", type=Output(), help="Write all figures, and each request's, here."),
    click.option("--plot", "plot_path", type=Output(), help="Draw the distributions and the throughput here."),
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
