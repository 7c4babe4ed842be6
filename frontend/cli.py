"""`pagewire frontend`, and `python -m frontend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frontend.settings import FrontendSettings
from protocol.options import service_command
from protocol.service import leave


def _load() -> Callable[[Any], None]:
    from frontend.server import run

    def run_and_leave(settings: FrontendSettings) -> None:
        run(settings)
        leave()

    return run_and_leave


main = service_command("frontend", FrontendSettings, _load, "Serve HTTP: text in and out, tokens to and from a scheduler.")
