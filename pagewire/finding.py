"""Where a running stack answers: what the user named, else what the run directory tells, else the default ports."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import click

from protocol.files import RunDirError
from protocol.options import Usage
from protocol.rundir import RunDir

API = "http://127.0.0.1:8000"
ADMIN = "http://127.0.0.1:8001"


def is_url(text: str) -> bool:
    """Whether an HTTP request could be sent there."""
    try:
        where = urlsplit(text)
        return where.scheme in ("http", "https") and bool(where.hostname) and where.port != 0
    except ValueError:  # a port that is no number
        return False


class Url(click.types.StringParamType):
    """The URL of a server; empty if none is named."""

    def convert(self, value: str, param: click.Parameter | None, context: click.Context | None) -> str:
        """The URL as it is. Raises BadParameter, one line, for what no request could be sent to."""
        if value and not is_url(value):
            self.fail(f"{value!r} is no URL such as {API}", param, context)
        return value


api_option = click.option(
    "--url",
    type=Url(),
    default="",
    show_default=f"what runs in --run-dir, else {API}",
    envvar="PAGEWIRE_URL",
    help="Where the server's /v1 is.",
)
admin_option = click.option(
    "--admin",
    type=Url(),
    default="",
    show_default=f"what runs in --run-dir, else {ADMIN}",
    envvar="PAGEWIRE_ADMIN_URL",
    help="The admin server.",
)


class NothingRuns(click.ClickException):
    """No service runs in the run directory that is asked; nothing has been made there."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(f"no service runs in {run_dir}")


def find_stack(run_dir: Path) -> RunDir:
    """The run directory of services that run. Raises NothingRuns; Usage, one line, if it cannot be used."""
    try:
        rundir = RunDir(run_dir, make=False)
    except RunDirError as error:
        raise Usage(str(error)) from None
    if not rundir.services():
        raise NothingRuns(run_dir)
    return rundir


def find_api(named: str, run_dir: Path) -> str:
    """The URL of an API. Raises NothingRuns, or Usage if no frontend answers, in a run directory that the user named."""
    return named or _found(run_dir, "frontend") or API


def find_admin(named: str, run_dir: Path) -> str:
    """The URL of an admin server. Raises NothingRuns, or Usage if none answers, in a run directory that the user named."""
    return named or _found(run_dir, "admin") or ADMIN


def _found(run_dir: Path, role: str) -> str:
    named = click.get_current_context().get_parameter_source("run_dir") is not click.core.ParameterSource.DEFAULT
    try:
        services = find_stack(run_dir).services()
    except NothingRuns:
        if named:
            raise
        return ""
    url = next((record.url for record in services if record.role == role and record.url), "")
    if not url and named:
        raise Usage(f"no {role} answers in {run_dir}: is `pagewire up` running there?")
    return url
