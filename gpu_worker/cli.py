"""`pagewire worker`, and `python -m gpu_worker`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_worker.errors import LoadError
from gpu_worker.settings import WorkerSettings
from protocol.options import service_command
from protocol.service import CannotRun, leave


def _load() -> Callable[[Any], None]:
    from gpu_worker.service import run

    def run_or_say_why(settings: WorkerSettings) -> None:
        try:
            run(settings)
        except LoadError as error:
            raise CannotRun(str(error)) from None
        leave()

    return run_or_say_why


main = service_command("worker", WorkerSettings, _load, "Hold a model's weights and KV blocks, and run its steps.")
