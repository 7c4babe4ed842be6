"""From settings to an engine and its description."""

from __future__ import annotations

import logging

import torch

from gpu_worker.cuda.compiler import compilers
from gpu_worker.cuda.engine import Engine
from gpu_worker.cuda.memory import Options
from gpu_worker.cuda.triton_kernel import begin_triton
from gpu_worker.cuda.weights import UnreadWeights
from gpu_worker.errors import LoadError
from gpu_worker.loading.config import ModelConfig
from gpu_worker.loading.kv_scales import kv_scales
from gpu_worker.loading.model_files import fingerprint, open_model
from gpu_worker.loading.source import Shard
from gpu_worker.runner import Description
from gpu_worker.settings import WorkerSettings
from protocol.tokenizer_files import bundle_hash

log = logging.getLogger("worker")

DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEAD_DIMS = (32, 64, 96, 128, 256)
OTHERWISE = "; --attention torch needs none of our kernels"


def load_engine(settings: WorkerSettings) -> tuple[Engine, Description]:
    """Load the model onto the card and make its cache. Raises LoadError, one line."""
    if not torch.cuda.is_available():
        raise LoadError("torch finds no usable GPU or driver (a CPU build of torch finds none); --device cpu serves without one")
    device = torch.device("cuda", torch.cuda.current_device())
    compilers().submit(begin_triton)
    log.debug("start: context open")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise LoadError(f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0, which the kernels need{OTHERWISE}")
    files = open_model(settings)
    config, dtype = files.config, DTYPES[settings.dtype]
    if not isinstance(config, ModelConfig):
        raise LoadError(f"our kernels do not serve a {config.family}; --attention torch does, on the card too")
    length = settings.max_model_len or min(4096, config.max_length)
    if length > config.max_length:
        raise LoadError(f"max_model_len {length} is more than the {config.max_length} tokens the model was made for")
    config.check_length(length)
    if settings.kv_cache_dtype == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        raise LoadError(f"--kv-cache-dtype fp8 needs compute capability 8.9, which {torch.cuda.get_device_name(device)} has not{OTHERWISE}")
    if settings.max_num_seqs > 1024:
        raise LoadError(f"max_num_seqs {settings.max_num_seqs} is more than the 1024 sequences that a card runs at once")
    if config.head_dim not in HEAD_DIMS:
        dims = ", ".join(map(str, HEAD_DIMS))
        raise LoadError(f"head dimension {config.head_dim} is not supported on the card, only {dims} are{OTHERWISE}")
    if config.head_dim * dtype.itemsize > 512:
        raise LoadError(f"head dimension {config.head_dim} is not supported in {settings.dtype} on the card; bfloat16 is{OTHERWISE}")
    if config.heads // config.kv_heads > 16:
        raise LoadError(
            f"{config.heads // config.kv_heads} query heads per key/value head are not supported on the card; up to 16 are{OTHERWISE}"
        )
    if config.hidden % 8 or config.intermediate % 8:
        raise LoadError(
            f"hidden size {config.hidden} and intermediate size {config.intermediate} must be multiples of 8 on the card{OTHERWISE}"
        )
    try:
        source = files.tensors(device, dtype)
        fp8_cache = None
        if settings.kv_cache_dtype == "fp8":
            fp8_cache = torch.tensor([(*units, 0.0, 0.0) for units in kv_scales(source, config.layers)], device=device)
        options = Options(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.step_tokens(),
            max_model_len=length,
            block_size=settings.block_size,
            num_blocks=settings.num_gpu_blocks,
            host_blocks=settings.num_cpu_blocks,
            utilization=settings.gpu_memory_utilization,
            graphs=not settings.enforce_eager,
            filter_kernel=settings.filter_kernel,
            pack_prefixes=settings.pack_prefixes,
        )
        engine = Engine(config, UnreadWeights(source, config, device, dtype, Shard()), options, fp8_cache)
    except RuntimeError as error:
        compilers().stop()
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            raise LoadError(f"the card's memory does not hold the model with its largest step: {str(error).splitlines()[0]}") from error
        raise
    except LoadError:
        compilers().stop()
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
