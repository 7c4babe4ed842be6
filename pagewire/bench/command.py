"""`pagewire bench serve|throughput|latency`: any OpenAI-compatible server, measured from outside."""

from __future__ import annotations

from typing import Any

import click

from pagewire.bench.exchange import Record
from pagewire.bench.figures import figures
from pagewire.bench.options import LENGTHS, OUTPUT, PROMPTS, SERVER, objectives, some, with_options
from pagewire.bench.running import compared, fail_if_any, measure_and_report, prepare, run_once, save, workload_requests
from pagewire.bench.workloads import Request
from protocol.options import CONTEXT, Number


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
    type=Number(0, min_open=True),
    callback=some,
    show_default="all at once",
    help="Requests/s (inf: all at once).",
)
@click.option(
    "--arrivals", type=click.Choice(("poisson", "even", "burst")), default="poisson", show_default=True, help="When, at that rate."
)
@click.option(
    "--burstiness",
    type=Number(0, min_open=True),
    default=1.0,
    show_default=True,
    help="1: Poisson; below: bunched; above: evener.",
)
@click.option(
    "--seconds",
    type=Number(0, min_open=True),
    callback=some,
    show_default="all",
    help="Only what arrives within so many seconds.",
)
@click.option(
    "--max-concurrency", "--concurrency", "concurrency", type=click.IntRange(0), default=0, show_default="no bound", help="Most under way."
)
@click.option("--no-stream", "stream", is_flag=True, default=True, flag_value=False, help="Ask for whole answers.")
@click.option("--warmup", type=click.IntRange(0), default=0, help="Requests sent beforehand and not counted.")
@click.option("--goodput", multiple=True, callback=objectives, metavar="METRIC:MS", help="An objective, such as ttft:200; may be repeated.")
@with_options(OUTPUT)
def serve(arrivals: str, concurrency: int, warmup: int, goodput: dict[str, float], **options: Any) -> None:
    """Online: requests arrive at a rate, answers are streamed, who waits how long?"""
    if compared(options):
        return
    burstiness = {"poisson": options["burstiness"], "even": float("inf"), "burst": options["burstiness"]}[arrivals]
    if arrivals == "burst":
        options["rate"] = 0.0
    options["burstiness"] = burstiness
    target, workload = prepare(options)
    requests = workload_requests(workload)
    if warmup:
        run_once(target, [Request(0.0, request.body) for request in requests[:warmup]], options, concurrency, "warm-up")
    measure_and_report(target, requests, options, concurrency, goodput)


@main.command()
@with_options(SERVER, LENGTHS, PROMPTS, OUTPUT)
def throughput(**options: Any) -> None:
    """All requests at once, whole answers: how much comes out?"""
    if compared(options):
        return
    target, workload = prepare(options | {"stream": False})
    measure_and_report(target, workload_requests(workload), options, 0, {})


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
    if compared(options):
        return
    sizes = {"requests": batch_size, "input": (input_len, input_len), "output": (output_len, output_len), "repeat": 1}
    target, workload = prepare(options | sizes | {"kind": "random"})
    requests = workload_requests(workload)
    for i in range(num_iters_warmup):
        run_once(target, requests, options, 0, f"warm-up {i + 1}/{num_iters_warmup}")
    runs = []
    for i in range(num_iters):
        records = run_once(target, requests, options, 0, f"batch {i + 1}/{num_iters}")
        runs.append((records, figures(records, percentiles=options["percentiles"])))
    batches = [
        Record(0.0, first=found["duration"], last=found["duration"], error="" if not found["failed"] else "failed") for _, found in runs
    ]
    together = figures(batches, percentiles=options["percentiles"])
    click.echo(f"batches of {batch_size}, {input_len} tokens in and {output_len} out: mean {together['mean_e2el_ms']:.1f} ms")
    click.echo("   ".join(f"p{percent:g} {together[f'p{percent:g}_e2el_ms']:.1f} ms" for percent in options["percentiles"]))
    batch = {"batch_size": batch_size, "input_len": input_len, "output_len": output_len}
    save(options, runs, {"url": target.url, **batch, "latency_ms": together["mean_e2el_ms"]})
    fail_if_any(runs)
