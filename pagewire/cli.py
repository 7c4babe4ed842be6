"""The command `pagewire`. Subcommands are imported when they are named, so that none pays for another's libraries."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from pagewire.finding import NothingRuns, find_stack
from protocol.files import RunDirError
from protocol.options import CONTEXT, Number, options, run_dir_option, start
from protocol.times import Times

SERVICES = {"frontend": "frontend.cli", "scheduler": "scheduler_svc.cli", "worker": "gpu_worker.cli", "admin": "pagewire.admin"}
TOOLS = {
    "chat": "pagewire.chat",
    "top": "pagewire.top",
    "trace": "pagewire.trace",
    "bench": "pagewire.bench.command",
    "plan": "pagewire.plan.command",
}
TEXTS = {
    "up": "Start all services and keep them running.",
    "serve": "The same as `up`, with the model named.",
}


class _Commands(click.Group):
    """A group whose members come from the packages that define them."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [*TEXTS, *SERVICES, *TOOLS, *super().list_commands(context)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if module := SERVICES.get(name) or TOOLS.get(name):
            return importlib.import_module(module).main  # type: ignore[no-any-return]
        if name in TEXTS:
            return _up_command(name)
        return super().get_command(context, name)


@click.group(cls=_Commands, context_settings=CONTEXT)
@click.version_option(version("pagewire"), prog_name="pagewire")
@click.pass_context
def main(context: click.Context) -> None:
    """An LLM inference server of three kinds of process that survive one another."""
    if os.environ.get("NO_COLOR"):  # no-color.org
        context.color = False


def _up_command(name: str) -> click.Command:
    from pagewire.up import up, up_fields
    from protocol.flags import UP

    fields = [field for field in up_fields() if name == "up" or field.name != "model"]
    params = options(UP, fields)
    if name == "serve":
        params.append(click.Argument(["model"]))

    @click.pass_context
    def callback(context: click.Context, /, **values: Any) -> None:
        sys.exit(up(context, values))

    return click.Command(name, params=params, callback=callback, help=TEXTS[name])


@main.command()
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def ps(run_dir: Path, as_json: bool) -> None:
    """List the services of a run directory; exit code 1 if there are none."""
    columns = ("role", "name", "pid", "incarnation", "state")
    try:
        services = find_stack(run_dir).services()
    except NothingRuns:
        if as_json:
            click.echo("[]")
        raise
    rows = [{column: getattr(record, column) for column in columns} for record in services]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for line in table:
        click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


@main.command()
@click.argument("name")
@run_dir_option
@click.option("--content", is_flag=True, help="Show prompts and tokens too.")
@click.option("--count", type=click.IntRange(1), help="Stop after this many messages.")
def tap(name: str, run_dir: Path, content: bool, count: int | None) -> None:
    """Print a service's messages as they pass.

    NAME is one of those that `pagewire ps` lists. Prompts and tokens are blanked.
    """
    import zmq

    from pagewire.tap import line, messages
    from protocol.options import Usage

    rundir = find_stack(run_dir)
    names = [record.name for record in rundir.services()]
    if name not in names:
        raise Usage(f"no service {name!r} runs in {run_dir}; there are: {', '.join(names)}")
    stop, wake = os.pipe()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda *_: os.write(wake, b"."))
    with contextlib.closing(messages(rundir.tap(name), zmq.Context.instance(), stop)) as passing:
        for number, (direction, at, frames) in enumerate(passing, 1):
            click.echo(line(direction, at, frames, content))
            if number == count:
                break


@main.command()
@click.argument("name")
@run_dir_option
@click.option("--timeout", type=Number(0), default=Times().drain, show_default=True, help="Seconds until it is stopped all the same.")
def drain(name: str, run_dir: Path, timeout: float) -> None:
    """Let a worker or frontend hand over what it does, and leave.

    A worker's requests go on at others of its model. `pagewire up` does not start it again until `pagewire start` says so.
    """
    from pagewire.replace import drain as run

    with _usage():
        sys.exit(0 if run(find_stack(run_dir), name, timeout, click.echo) else 1)


@main.command("start")
@click.argument("name")
@run_dir_option
@click.option("--ready-timeout", type=Number(0), default=600.0, show_default=True, help="Seconds to get ready.")
def start_again(name: str, run_dir: Path, ready_timeout: float) -> None:
    """Start a service of `pagewire up` again that was drained."""
    from pagewire.replace import start as run

    with _usage():
        run(find_stack(run_dir), name, ready_timeout, click.echo)


@main.command()
@click.argument("names", nargs=-1)
@run_dir_option
@click.option("--drain-timeout", type=Number(0), default=Times().drain, show_default=True, help="Seconds for each to hand over.")
@click.option("--ready-timeout", type=Number(0), default=600.0, show_default=True, help="Seconds for each new one to get ready.")
def roll(names: tuple[str, ...], run_dir: Path, drain_timeout: float, ready_timeout: float) -> None:
    """Replace the services of `pagewire up` one at a time, while they serve.

    NAMES are services that `pagewire ps` lists; all of them by default. A new worker needs room beside the old one.
    """
    from pagewire.replace import roll as run

    with _usage():
        run(find_stack(run_dir), names, drain_timeout, ready_timeout, click.echo)


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """What a run directory objects to, as one line."""
    from pagewire.replace import NotDone
    from protocol.options import Usage

    try:
        yield
    except NotDone as error:
        raise click.ClickException(str(error)) from None
    except RunDirError as error:
        raise Usage(str(error)) from None


@main.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--frontend", "frontends", multiple=True, metavar="NAME", help="A frontend that gets a key; may be repeated.")
@click.option("--worker", "workers", multiple=True, metavar="NAME", help="A worker that gets a key; may be repeated.")
def keys(folder: Path, frontends: tuple[str, ...], workers: tuple[str, ...]) -> None:
    """Make the keys of links between hosts, in FOLDER.

    The first call makes the scheduler's key pair; each call makes one for every client named, and lets it in.
    """
    from pagewire.keys import make_keys, parse_clients

    with _usage():
        for text in make_keys(folder, parse_clients(frontends, workers)):
            click.echo(text)


def run() -> None:
    """The program `pagewire`."""
    start(main, "pagewire")


if __name__ == "__main__":
    run()
