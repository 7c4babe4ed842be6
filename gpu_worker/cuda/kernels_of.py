"""All kernels of a model's steps, begun before there is a model: as soon as it is known what they are compiled for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from gpu_worker.cuda.attention_kernels import AttentionKernels
from gpu_worker.cuda.build import Build, build_of
from gpu_worker.cuda.card import first_card
from gpu_worker.cuda.compiler import compilers
from gpu_worker.cuda.step_kernels import StepKernels
from gpu_worker.cuda.triton_kernel import begin_triton
from gpu_worker.errors import LoadError
from gpu_worker.loading.config import from_json
from gpu_worker.loading.quantization import ROUNDED
from gpu_worker.settings import WorkerSettings


class Kernels:
    """Kernels whose compilation has begun, Triton's first, which take longest; of both is compiled what the caches on disk lack."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.attention = AttentionKernels(build)
        self.step = StepKernels(build)


def begin_kernels(settings: WorkerSettings) -> Kernels | None:
    """What an engine of these settings will want, as far as a folder's `config.json` tells. It needs no torch.

    None where that tells nothing (a GGUF file, a name on the hub) or something that is not served: loading finds out, and says why.
    """
    compilers().submit(begin_triton)
    card = first_card()
    if card is None or settings.load_format == "gguf":
        return None
    try:
        config = from_json(json.loads((Path(settings.model).expanduser() / "config.json").read_text()))
        if settings.quantization == "fp8" and config.quantization is None:
            config = replace(config, quantization=ROUNDED)
        return Kernels(build_of(settings, config, card))
    except (LoadError, OSError, ValueError, AttributeError):
        return None
