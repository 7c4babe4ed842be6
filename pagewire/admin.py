"""`pagewire admin`: collects telemetry and serves the live page, `/metrics`, `/monitor` and `/health`, on loopback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocol.options import service_command, start
from protocol.service import leave
from protocol.times import Times


@dataclass(frozen=True)
class AdminSettings:
    """Where the admin server listens, and where it collects."""

    run_dir: Path
    name: str = "admin"
    admin_port: int = 8001
    admin_hosts: str = ""  # names, with commas between, that requests may call it by, besides loopback's
    listen_fd: int = -1  # a listening socket handed over by the supervisor; −1: bind 127.0.0.1 and admin_port
    api: str = ""  # URL of a frontend that the live page's prompts go to; empty: it takes none
    telemetry: str = ""  # endpoint; empty: the run directory's
    log_level: str = "info"
    log_format: str = "text"
    times: Times = field(default_factory=Times)


def _load() -> Callable[[Any], None]:
    from pagewire.admin_server import run

    def run_and_leave(settings: AdminSettings) -> None:
        run(settings)
        leave()

    return run_and_leave


main = service_command("admin", AdminSettings, _load, "Serve the figures of all services on loopback.")

if __name__ == "__main__":
    start(main, "pagewire admin")
