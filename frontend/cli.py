"""`pagewire frontend`, and `python -m frontend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frontend.settings import FrontendSettings
from protocol.options import service_command


def _load() -> Callable[[Any], None]:
    from frontend.server import run

    return run


main = service_command("frontend", FrontendSettings, _load, "Serve HTTP: text in and out, tokens to and from a scheduler.")
