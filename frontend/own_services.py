"""A scheduler and a worker of one's own, for programs that use the offline API. They end with their program."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from frontend.own_settings import SCHEDULER, WORKER
from protocol.flags import FLAGS
from protocol.guardian import Guardian
from protocol.service import PARENT

END_WITHIN = 6.0  # seconds from SIGTERM to SIGKILL


class ServiceDied(RuntimeError):
    """A service ended; the message has its last words."""


class OwnServices:
    """Started by the constructor, in a run directory of their own; `close` ends them and removes it.

    The kernel ends them when the thread that made them does, so make it in one that lives as long as the program.
    settings: `checked` ones.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="pagewire-llm-"))
        self._guardian = Guardian(self.run_dir, passing=True)  # removes it even if this program is killed
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name, module, known in (("worker-0", "gpu_worker", WORKER), ("scheduler-0", "scheduler_svc", SCHEDULER)):
            arguments = [word for key, value in settings.items() if key in known for word in _argument(key, value)]
            command = [sys.executable, "-P", "-m", module, *arguments, "--run-dir", str(self.run_dir), "--name", name]
            with self._log(name).open("wb") as log:
                self._processes[name] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, PARENT: str(os.getpid())},
                    process_group=0,  # a Ctrl-C reaches the program alone, which then ends them
                )
            self._guardian.watch(self._processes[name].pid)

    def check(self) -> None:
        """Raise ServiceDied if one has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                self._guardian.forget(process.pid)  # its number may soon be somebody else's
                words = self._log(name).read_text(errors="replace").strip().splitlines()
                raise ServiceDied(f"{name} ended with code {process.returncode}: {words[-1] if words else 'it said nothing'}")

    def close(self) -> None:
        """End both, by force if they hang, and remove the run directory. Harmless when repeated."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + END_WITHIN
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.01))
            if process.poll() is None:
                process.kill()
                process.wait()
            self._guardian.forget(process.pid)
        self._guardian.close()
        shutil.rmtree(self.run_dir, ignore_errors=True)  # should the guardian have been killed

    def _log(self, name: str) -> Path:
        return self.run_dir / f"{name}.out"


def _argument(key: str, value: Any) -> list[str]:
    flag = FLAGS[key].name or "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, str(value)]
