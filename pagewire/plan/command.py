"""`pagewire plan`: what a model needs and what fits, as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
import re

import click

from pagewire.plan.memory import BYTES, Setup
from pagewire.plan.room import MOST_SEQUENCES, Room, largest_batch, largest_context, longest_served, room
from pagewire.plan.sizes import PlanError, Sizes, read_sizes
from protocol.options import CONTEXT, Number, Usage

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
BATCHES = (1, 8, 64, 256)


def size(context: click.Context, param: click.Parameter, value: str) -> int:
    """Bytes of 80GiB, 80GB, 24G (= GB) or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", value.strip().upper())
    if not found or found[2] not in UNITS or not float(found[1]):
        raise click.BadParameter(f"{value!r} is no size such as 80GiB or 24GB", context, param)
    if not found[2] and float(found[1]) < 2**20:
        raise click.BadParameter(f"{value!r} would be bytes: name a unit, as in {value}GiB", context, param)
    return int(float(found[1]) * UNITS[found[2]])


@click.command(context_settings=CONTEXT)
@click.option("--model", default="", show_default="the packaged SmolLM2-135M-Instruct", help="Folder with a config.json, or .gguf file.")
@click.option(
    "--gpu-memory", callback=size, default="80GiB", show_default=True, help="Memory of the device (of the host with --device cpu)."
)
@click.option("--device", type=click.Choice(("cuda", "cpu")), default="cuda", show_default=True, help="Where the worker would run.")
@click.option("--dtype", type=click.Choice(("auto", *BYTES)), default="auto", show_default=True, help="Type of weights and activations.")
@click.option("--quantization", type=click.Choice(("auto", "fp8")), default="auto", show_default=True, help="Weights of linears.")
@click.option("--kv-cache-dtype", type=click.Choice(("auto", "fp8")), default="auto", show_default=True, help="Cached keys and values.")
@click.option("--block-size", type=click.IntRange(1, 4096), default=16, show_default=True, help="Tokens of one KV block.")
@click.option("--max-num-seqs", type=click.IntRange(1, MOST_SEQUENCES), default=256, show_default=True, help="Sequences that run at once.")
@click.option(
    "--max-num-batched-tokens", type=click.IntRange(0), default=0, show_default="8192, on the CPU 512", help="Tokens of one step."
)
@click.option(
    "--max-model-len", type=click.IntRange(0), default=0, show_default="4096, or less if the model's is", help="Tokens of a sequence."
)
@click.option(
    "--gpu-memory-utilization",
    type=Number(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    help="Share of the memory to use.",
)
@click.option("--context", type=click.IntRange(1), help="Only the largest batch at this context, in tokens.")
@click.option("--batch", type=click.IntRange(1, MOST_SEQUENCES), help="Only the largest context of this batch, in sequences.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(model: str, gpu_memory: int, context: int | None, batch: int | None, as_json: bool, **setup: object) -> None:
    """Say what a model needs and what fits on a device. Needs no GPU and reads no weights."""
    try:
        made = Setup(**setup)  # type: ignore[arg-type]
        sizes = read_sizes(model)
        longest = longest_served(sizes)
        contexts = [context] if context else [c for c in CONTEXTS if c <= longest] if not batch else []
        batches = [batch] if batch else BATCHES if not context else []
        found = room(sizes, gpu_memory, made)
        by_context = {c: largest_batch(sizes, c, gpu_memory, made) for c in contexts}
        by_batch = {b: largest_context(sizes, b, gpu_memory, made) for b in batches}
    except PlanError as error:
        raise Usage(str(error)) from error
    if as_json:
        click.echo(json.dumps(_object(sizes, found, by_context, by_batch), indent=2))
    else:
        _print(sizes, found, by_context, by_batch)


def _object(sizes: Sizes, found: Room, by_context: dict[int, int], by_batch: dict[int, int]) -> dict[str, object]:
    return {
        "model": sizes.name,
        "memory": dataclasses.asdict(found.memory),
        "limit": found.limit,
        "total": found.memory.total(found.blocks) + found.memory.overhead,
        "blocks": found.blocks,
        "cached_tokens": found.tokens,
        "max_model_len": found.context,
        "largest_batch": {str(c): b for c, b in by_context.items()},
        "largest_context": {str(b): c for b, c in by_batch.items()},
        "recommended": found.settings,
        "notes": list(found.notes),
    }


def _print(sizes: Sizes, found: Room, by_context: dict[int, int], by_batch: dict[int, int]) -> None:
    memory = found.memory
    parts = ", ".join(f"{name} {_human(size)}" for name, size in memory.parts.items())
    rows = [
        ("model", f"{sizes.name} ({sizes.config.family}, {memory.parameters:,} parameters)"),
        ("weights", f"{_human(memory.weights)}  ({parts})"),
        ("activations", f"{_human(memory.activations)}  (buffers and temporaries of the largest step)"),
        ("overhead", f"{_human(memory.overhead)}  (outside the allocator)"),
        ("KV per token", f"{_human(memory.kv_per_token)}  (a block: {_human(memory.kv_per_block)})"),
        ("memory to use", _human(found.limit)),
        ("blocks", f"{found.blocks:,}  ({found.tokens:,} tokens)"),
    ]
    for name, text in rows:
        click.echo(f"{name:14}  {text}")
    if by_context:
        click.echo("\nlargest batch at a context of")
        for context, batch in by_context.items():
            click.echo(f"{context:>12,} tokens  {batch:>6,}" + ("  (or more: one worker holds no more)" if batch == MOST_SEQUENCES else ""))
    if by_batch:
        longest = longest_served(sizes)
        click.echo("\nlargest context of a batch of")
        for batch, context in by_batch.items():
            click.echo(f"{batch:>12,}         {context:>6,} tokens" + ("  (the model's limit)" if context == longest else ""))
    if found.settings:
        click.echo("\nrecommended: " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in found.settings.items()))
    for note in found.notes:
        click.echo(f"note: {note}")


def _human(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
