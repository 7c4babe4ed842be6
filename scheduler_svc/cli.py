"""`pagewire scheduler`, and `python -m scheduler_svc`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from protocol.options import service_command
from scheduler_svc.settings import SchedulerSettings


def _load() -> Callable[[Any], None]:
    from scheduler_svc.service import run

    return run


main = service_command("scheduler", SchedulerSettings, _load, "Decide what runs next, and in which KV blocks.")
