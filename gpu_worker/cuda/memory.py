"""What can be set about an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Sizes and switches of an engine; every optimisation can be turned off."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 4096
    block_size: int = 16
    host_blocks: int = 0
    num_blocks: int = 0  # 0: what fits under `utilization`
    utilization: float = 0.9
    graphs: bool = True
    capture_idle: bool = True  # graphs of likely sizes before they are met, while nothing runs
    pdl: bool = True
    few: bool = True  # linear.cu for few tokens
    few_fp8: bool = True  # and for fp8 weights; else they are multiplied by cuBLAS for any number of tokens
    few_attention: int = 8  # rows up to which decode attention is decode_few.cu's
    prefill_hopper: bool = True  # prefill attention by kernels/prefill_hopper.py, where it can be
    filter_kernel: bool = True  # top-k, top-p and min-p by kernels/filter.cu; else by torch, which sorts whole rows for top-p alone
    pack_prefixes: bool = True  # decode attention reads a prefix that neighbouring rows share once for several of them
