"""The settings of a program's own services (`own_services.py`), checked before any process is started."""

from __future__ import annotations

import os
import re
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from protocol.flags import FLAGS, Flag

SCHEDULER = (
    *("policy", "depth", "preemption", "enable_prefix_caching", "long_prefill_token_threshold"),
    *("max_num_partial_prefills", "max_waiting_requests", "max_waiting_tokens"),
)
WORKER = (
    *("model", "runner", "device", "tensor_parallel_size", "pipeline_parallel_size", "dtype", "load_format", "attention", "enforce_eager"),
    *("block_size", "num_gpu_blocks", "num_cpu_blocks", "pack_prefixes", "gpu_memory_utilization", "max_num_seqs"),
    *("max_num_batched_tokens", "max_model_len", "seed", "threads", "step_time"),
    *("filter_kernel", "quantization", "kv_cache_dtype", "served_model_name"),
)
TEXTS = ("model", "served_model_name")


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are given; None leaves one at its default.

    Raises TypeError for one that neither service has, ValueError, naming it, for one whose value it cannot have.
    """
    if unknown := settings.keys() - {*SCHEDULER, *WORKER}:
        raise TypeError(f"there is no setting {min(unknown)!r}")
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if why := _why_not(name, FLAGS[name], value):
            raise ValueError(f"{name}: {why}")
    model = os.fspath(given.get("model", ""))
    if model and given.get("runner", "torch") == "torch" and not _may_be_there(model):
        raise ValueError(f"model: there is no {model}; a model is a folder, a .gguf file or a hub id like owner/name")
    return given


def _why_not(name: str, flag: Flag, value: object) -> str:
    """Why a setting cannot have this value; empty if it can. What `flags.py` bounds is a number, whole if the bound is."""
    if name in TEXTS:
        return "" if isinstance(value, str | os.PathLike) else f"a text, not {value!r}"
    if flag.choices:
        return "" if value in flag.choices else f"{value!r} is not one of {', '.join(flag.choices)}"
    if flag.low is None:
        return "" if isinstance(value, bool) else f"True or False, not {value!r}"
    kind, called = (Integral, "a whole number") if isinstance(flag.low, int) else (Real, "a number")
    if not isinstance(value, kind) or isinstance(value, bool):
        return f"{called}, not {value!r}"
    if flag.low <= value and (flag.high is None or value <= flag.high):  # type: ignore[operator]
        return ""
    if flag.low == flag.high:
        return f"{flag.low} is the only size supported, not {value!r}"
    return f"{value!r} is not {flag.low} or more" + ("" if flag.high is None else f", and {flag.high} at most")


def _may_be_there(model: str) -> bool:
    """Whether it is a path, or looks like a hub id, which the worker asks the hub about."""
    path = Path(model).expanduser()
    return path.exists() or (path.suffix != ".gguf" and re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None)
