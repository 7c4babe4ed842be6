"""Which runner a worker's settings ask for. Torch is imported only if one asks for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gpu_worker.byte_model import check_room
from gpu_worker.loading.config import FAMILIES, architecture
from gpu_worker.oracle import OracleRunner
from gpu_worker.runner import Runner
from gpu_worker.settings import WorkerSettings
from gpu_worker.simulated import SimulatedRunner, StepTime


def make_runner(settings: WorkerSettings, environ: Mapping[str, str]) -> Runner:
    """The runner named in the settings. Raises ValueError or LoadError, one line, for one that does not exist or cannot be.

    Options that only tests and benchmarks have come from the environment: PAGEWIRE_ORACLE_STEP_TIME (seconds),
    PAGEWIRE_ORACLE_MARKS (`TOKEN=EFFECT,…`, effects as in `oracle.MARKS`), PAGEWIRE_SIMULATED_PER_TOKEN and
    PAGEWIRE_SIMULATED_PER_KV_TOKEN (seconds).
    """
    match settings.runner:
        case "oracle":
            check_room(settings)
            marks = environ.get("PAGEWIRE_ORACLE_MARKS", "")
            return OracleRunner(settings, _seconds(environ, "PAGEWIRE_ORACLE_STEP_TIME"), _marks(marks))
        case "simulated":
            check_room(settings)
            per_token = _seconds(environ, "PAGEWIRE_SIMULATED_PER_TOKEN")
            per_kv_token = _seconds(environ, "PAGEWIRE_SIMULATED_PER_KV_TOKEN")
            return SimulatedRunner(settings, StepTime(settings.step_time, per_token, per_kv_token))
        case "torch" if _on_card(settings):
            from gpu_worker.cuda.runner import CudaRunner

            return CudaRunner(settings)
        case "torch":
            from gpu_worker.torch_runner import TorchRunner

            runner: Runner = TorchRunner(settings)
            return runner
    raise ValueError(f"--runner {settings.runner}: name one of torch, oracle, simulated")


def _on_card(settings: WorkerSettings) -> bool:
    """Whether the kernels for NVIDIA cards are wanted; `--attention torch` computes the model with plain torch there too."""
    if settings.attention not in ("auto", "triton") or settings.device == "cpu":
        return False
    if settings.attention == "auto" and _of_transformers(settings.model):
        return False
    from gpu_worker.cuda.runner import has_card

    return settings.device == "cuda" or has_card()


def _of_transformers(model: str) -> bool:
    """Whether this is a folder with a model that is none of our families, which the kernels do not know."""
    try:
        config = json.loads((Path(model).expanduser() / "config.json").read_text()) if model else {}
        return architecture(config) not in ("", *FAMILIES)
    except (OSError, ValueError, AttributeError):
        return False  # loading says what is wrong


def _seconds(environ: Mapping[str, str], name: str) -> float:
    try:
        return float(environ.get(name, "0"))
    except ValueError:
        raise ValueError(f"{name}={environ[name]} is not a number of seconds") from None


def _marks(text: str) -> dict[int, str]:
    marks = {}
    for mark in filter(None, text.split(",")):
        token, _, effect = mark.partition("=")
        if not token.isdecimal():
            raise ValueError(f"PAGEWIRE_ORACLE_MARKS: {mark!r} is not of the form TOKEN=EFFECT")
        marks[int(token)] = effect
    return marks
