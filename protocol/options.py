"""From settings to a command line: flags, environment, an optional TOML file, and defaults, in that order.

A service declares its settings as a dataclass (`settings.py`) and gets its command from `service_command`; what a
setting is called, means and is measured in stands in `flags.py`, once for all services.

    flag         --max-num-seqs 64
    environment  PAGEWIRE_WORKER_MAX_NUM_SEQS for workers alone, or PAGEWIRE_MAX_NUM_SEQS
    file         --config FILE: `max_num_seqs = 64` at the top, or in a table `[worker]`
"""

from __future__ import annotations

import dataclasses
import errno
import io
import math
import os
import sys
import tomllib
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from protocol.environment import unknown_variables
from protocol.files import RunDirError
from protocol.flags import FLAGS, TABLES, UP, UP_OWN, Flag
from protocol.rundir import default_run_dir
from protocol.service import EXIT_FAILED, PARENT, CannotRun, die_early, die_with_parent, refuse
from protocol.times import Times

Settings = Any  # a dataclass instance; which one, the service knows


def service_command(role: str, settings: type, load: Callable[[], Callable[[Settings], None]], text: str) -> click.Command:
    """The command that runs one service.

    `load` imports the service and returns its `run`; it is called only after the flags have been read, so that
    `--help` and mistakes answer at once. `run` raises CannotRun or RunDirError for what the user must mend.
    """

    def callback(**values: Any) -> None:
        die_with_parent()
        try:
            built = build(settings, values)
            try:
                _loaded(role, load)(built)
            except (CannotRun, RunDirError):
                raise
            except Exception as error:
                die_early(built.run_dir, built.name, built.log_format, error)
        except (CannotRun, RunDirError) as error:
            refuse(error)

    params = options(role, settings_fields(settings))
    return click.Command(role, params=params, callback=callback, help=text, context_settings=CONTEXT)


def _loaded(role: str, load: Callable[[], Callable[[Settings], None]]) -> Callable[[Settings], None]:
    try:
        return load()
    except ModuleNotFoundError as error:
        raise CannotRun(f"{error.name} is not installed: pip install 'pagewire[{EXTRAS.get(role, role)}]'") from None


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what a disk says that takes nothing
EXTRAS = {"admin": "frontend"}  # where a role's libraries come from another's extra
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Output(click.Path):
    """A file to write at the end of some work; whether there is a place for it is asked before that work."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """A Path. Raises BadParameter, one line."""
        path = Path(str(super().convert(value, param, context)))
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            self.fail(f"{path.parent} is no folder that can be written to", param, context)
        return path


class Number(click.FloatRange):
    """A number within bounds; `nan`, which no bound keeps out, is none."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """A float. Raises BadParameter, one line."""
        number = super().convert(value, param, context)
        if math.isnan(number):
            self.fail("nan is no number", param, context)
        return number


class OnlySize(click.types.IntParamType):
    """A size of which one alone is supported: 1."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """1. Raises BadParameter for all else."""
        size = super().convert(value, param, context)
        if size != 1:
            self.fail(f"1 is the only size supported, not {size}", param, context)
        return size


@dataclasses.dataclass(frozen=True)
class Field:
    """A setting: its name, type and default as the dataclass has them."""

    name: str
    type: Any
    default: Any


def settings_fields(settings: type) -> list[Field]:
    """The settings of a dataclass, in order."""
    hints = typing.get_type_hints(settings)
    return [Field(f.name, hints[f.name], f.default) for f in dataclasses.fields(settings)]


def options(role: str, fields: Iterable[Field]) -> list[click.Parameter]:
    """Click's parameters for these settings, `--config` included. `role` names the environment's and file's own part."""
    params: list[click.Parameter] = [
        click.Option(
            ["--config"],
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            envvar="PAGEWIRE_CONFIG",
            is_eager=True,
            expose_value=False,
            callback=lambda context, _, path: _read_config(context, role, path),
            help="TOML file with settings; flags and environment go first.",
        )
    ]
    for field in fields:
        params.append(_option(role, field, FLAGS[field.name]))
        if field.name == "device":
            params += [_refused("--trust-remote-code", "remote code is never run"), _refused("--worker-use-ray", "workers are processes")]
    return params


def build(settings: type, values: dict[str, Any]) -> Settings:
    """Make the settings from click's values; those of other services are left out."""
    given = {f.name: values[f.name] for f in settings_fields(settings) if f.name in values}
    if "times" in given:
        given["times"] = Times().scaled(given["times"])
    return settings(**given)


def _option(role: str, field: Field, flag: Flag) -> click.Option:
    name = flag.name or "--" + field.name.replace("_", "-")
    declaration = [name, field.name]
    default = field.default
    extra: dict[str, Any] = {}
    if field.type is bool:
        declaration[0] = f"{name}/--no-{name[2:]}"
    elif field.type is Times:
        extra, default = {"type": Number(min=0, min_open=True)}, 1.0
    elif field.name == "run_dir":
        return click.Option(["--run-dir"], **RUN_DIR)
    elif flag.choices:
        extra["type"] = click.Choice(flag.choices)
    elif flag.low == flag.high == 1:
        extra["type"] = OnlySize()
    elif field.type is int:
        low, high = (None if bound is None else int(bound) for bound in (flag.low, flag.high))
        extra["type"] = click.IntRange(low, high)
    elif field.type is float:
        extra["type"] = Number(flag.low, flag.high)
    elif typing.get_origin(field.type) is tuple:
        extra, default = {"multiple": True, "type": str}, ()
    if default == "" and "type" not in extra:
        extra["show_default"] = flag.empty or False
    elif default == 0 and field.type is int and flag.empty:
        extra["show_default"] = flag.empty
    variables = [f"PAGEWIRE_{role.upper()}_{field.name.upper()}"] if role != UP else []
    if not flag.own:
        variables.append(f"PAGEWIRE_{field.name.upper()}")
    keywords = {"default": default, "show_default": True, "envvar": variables, "help": flag.help, "hidden": flag.hidden}
    return click.Option(declaration, **{**keywords, **extra})


def _run_dir(make: bool = True) -> Path:
    try:
        return default_run_dir(make)
    except RunDirError as error:
        raise click.ClickException(str(error)) from None


RUN_DIR: dict[str, Any] = {
    "type": click.Path(file_okay=False, path_type=Path),
    "envvar": "PAGEWIRE_RUN_DIR",
    "default": _run_dir,
    "show_default": "one per working directory",
    "help": FLAGS["run_dir"].help,
}
# the decorator for commands that talk to a running stack
run_dir_option = click.option("--run-dir", **{**RUN_DIR, "default": lambda: _run_dir(make=False)})


def _read_config(context: click.Context, role: str, path: Path | None) -> None:
    """Make a TOML file's values click's defaults. What no service knows is an error: nothing is ignored in silence."""
    if path is None:
        return
    context.meta["config"] = path
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise click.BadParameter(f"{path}: {error}") from None
    mine = {param.name for param in context.command.params}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            if key not in TABLES:
                raise click.BadParameter(f"{path}: there is no table [{key}]; there are {', '.join(TABLES)}")
        elif name not in FLAGS:
            raise click.BadParameter(f"{path}: nothing has a setting {key!r}")
        elif name in mine:
            values[name] = value
    # `up` passes the file on; of the services' tables it needs what it does itself, such as listening on the port.
    for table in TABLES if role == UP else (role,):
        for key, value in data.get(table, {}).items():
            name = key.replace("-", "_")
            if name not in (UP_OWN if table == UP else mine):
                raise click.BadParameter(f"{path}: {table} has no setting {key!r}")
            values[name] = value
    context.default_map = {**(context.default_map or {}), **values}


def _refused(name: str, why: str) -> click.Option:
    def check(context: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            raise Usage(f"{name} is not supported: {why}")

    return click.Option([name], is_flag=True, callback=check, expose_value=False, hidden=True)


class Usage(click.ClickException):
    """A mistake on the command line that takes one line to say."""

    exit_code = 2


def start(command: click.Command, program: str) -> None:
    """Run a command as a program."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal's encoding lacks is no reason to end
    if PARENT not in os.environ:  # whoever started this process has said so
        for line in unknown_variables(os.environ):
            click.echo(f"{program}: {line}", err=True)
    try:
        command.main(prog_name=program)
    except BrokenPipeError:
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if error.errno not in FULL:
            raise
        click.echo(f"Error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", err=True)
        sys.exit(EXIT_FAILED)
    finally:
        _flush()


def _flush() -> None:
    """Write what is not written yet. If nobody takes it, it would fail again at the interpreter's end, and make another exit code."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
