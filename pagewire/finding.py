"""Where a running stack answers: what the user named, else what the run directory tells, else the default ports."""

from __future__ import annotations

from pathlib import Path

import click

from protocol.files import RunDirError
from protocol.options import Usage
from protocol.rundir import RunDir

API = "http://127.0.0.1:8000"
ADMIN = "http://127.0.0.1:8001"

api_option = click.option(
    "--url", default="", show_default=f"what runs in --run-dir, else {API}", envvar="PAGEWIRE_URL", help="Where the server's /v1 is."
)
admin_option = click.option(
    "--admin", default="", show_default=f"what runs in --run-dir, else {ADMIN}", envvar="PAGEWIRE_ADMIN_URL", help="The admin server."
)


def find_api(named: str, run_dir: Path) -> str:
    """The URL of an API. Raises Usage, one line, if the user named a run directory in which no frontend answers."""
    return named or _found(run_dir, "frontend") or API


def find_admin(named: str, run_dir: Path) -> str:
    """The URL of an admin server. Raises Usage, one line, if the user named a run directory in which none answers."""
    return named or _found(run_dir, "admin") or ADMIN


def _found(run_dir: Path, role: str) -> str:
    try:
        services = RunDir(run_dir).services() if run_dir.is_dir() else []
    except RunDirError as error:
        raise Usage(str(error)) from None
    url = next((record.url for record in services if record.role == role and record.url), "")
    context = click.get_current_context()
    if not url and context.get_parameter_source("run_dir") is not click.core.ParameterSource.DEFAULT:
        raise Usage(f"no {role} answers in {run_dir}: is `pagewire up` running there?")
    return url
