"""What can be set about an engine, and how many blocks fit beside its weights and buffers."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.errors import LoadError
from gpu_worker.filter_memory import filter_bytes
from gpu_worker.loading.config import ModelConfig

_REST = 512 << 20  # bytes: cuBLAS, graphs, tables


@dataclass(frozen=True)
class Options:
    """Sizes and switches of an engine; every optimisation can be turned off."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 4096
    block_size: int = 16
    host_blocks: int = 0
    num_blocks: int = 0  # 0: what is left under `utilization`
    utilization: float = 0.9
    graphs: bool = True
    capture_idle: bool = True  # graphs of likely sizes before they are met, while nothing runs
    pdl: bool = True
    few: bool = True  # linear.cu for few tokens
    few_attention: int = 8  # rows up to which decode attention is decode_few.cu's
    filter_kernel: bool = False  # top-k, top-p and min-p by kernels/filter.cu; else by torch, which sorts whole rows for top-p alone
    pack_prefixes: bool = False  # decode attention reads a prefix that neighbouring rows share once for several of them


def blocks_that_fit(config: ModelConfig, options: Options, element: int, cached: int, free: int, total: int) -> int:
    """Blocks that `free` of `total` bytes hold under `utilization`, the weights loaded.

    element, cached: bytes of one value of an activation, and of a key or value.
    Raises LoadError, one line, if they do not hold a sequence of max_model_len.
    """
    c, o = config, options
    width = c.hidden * 2 + c.q_size * 2 + 2 * c.kv_size + 3 * c.intermediate
    buffers = element * (o.max_num_batched_tokens * width + o.max_num_seqs * c.vocab_size) + _REST
    buffers += filter_bytes(o.max_num_seqs, c.vocab_size, sorts=not o.filter_kernel)
    if c.quantization is not None:  # activations in fp8
        buffers += o.max_num_batched_tokens * max(c.hidden, c.q_size, c.intermediate)
    block = c.layers * 2 * c.kv_heads * o.block_size * c.head_dim * cached
    blocks = int((free - (1 - o.utilization) * total - buffers) // block) - 1
    needed = -(-o.max_model_len // o.block_size)
    if blocks < needed:
        raise LoadError(
            f"not enough memory on the card: {free >> 20} MiB are free beside the weights, {needed} blocks of {block >> 10} KiB "
            "are needed for one sequence; lower --max-model-len or raise --gpu-memory-utilization"
        )
    return blocks
