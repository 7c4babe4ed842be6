"""From settings to an engine and its description."""

from __future__ import annotations

import logging

import torch

from gpu_worker.cuda.build import build_of
from gpu_worker.cuda.engine import Engine, card_of
from gpu_worker.cuda.kernels_of import Kernels
from gpu_worker.cuda.weights import UnreadWeights
from gpu_worker.errors import LoadError
from gpu_worker.loading.kv_scales import kv_scales
from gpu_worker.loading.model_files import fingerprint, open_model
from gpu_worker.loading.source import Shard
from gpu_worker.runner import Description
from gpu_worker.settings import WorkerSettings
from protocol.tokenizer_files import bundle_hash

log = logging.getLogger("worker")


def load_engine(settings: WorkerSettings, kernels: Kernels | None = None) -> tuple[Engine, Description]:
    """Load the model onto the card and make its cache. kernels: as of `Engine`. Raises LoadError, one line."""
    if not torch.cuda.is_available():
        raise LoadError("torch finds no usable GPU or driver (a CPU build of torch finds none); --device cpu serves without one")
    device = torch.device("cuda", torch.cuda.current_device())
    log.debug("start: context open")
    files = open_model(settings)
    build = build_of(settings, files.config, card_of(device))
    config, dtype = build.config, getattr(torch, build.dtype)
    try:
        source = files.tensors(device, dtype)
        fp8_cache = None
        if build.fp8_cache:
            fp8_cache = torch.tensor([(*units, 0.0, 0.0) for units in kv_scales(source, config.layers)], device=device)
        engine = Engine(config, UnreadWeights(source, config, device, dtype, Shard()), build.options, fp8_cache, kernels)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            raise LoadError(f"the card's memory does not hold the model with its largest step: {str(error).splitlines()[0]}") from error
        raise
    fp8_linears = engine.forward.weights.fp8_linears
    if config.quantization is not None and not fp8_linears:
        log.warning("torch multiplies no such fp8 weights on this card with --dtype %s: they are kept in 16 or 32 bits", settings.dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    description = Description(
        model=files.name,
        fingerprint=fingerprint(files, dtype_name, False, dtype_name if fp8_cache is None else "fp8", fp8_linears),
        geometry=engine.geometry,
        attention="triton",
        eos=files.generation.eos,
        bos=files.generation.bos,
        defaults=files.generation.defaults,
        tokenizer=bundle_hash(files.bundle),
        bundle=files.bundle,
    )
    return engine, description
