"""Everything that can be set about a worker; the command line, environment and file fill it (`cli.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from protocol.times import Times

STEP_TOKENS = 8192
CPU_STEP_TOKENS = 512  # a CPU computes larger steps no faster, and every stream waits for them


@dataclass(frozen=True)
class WorkerSettings:
    """Endpoints are ZeroMQ's, sizes are in tokens or blocks, durations in seconds."""

    run_dir: Path
    name: str = "worker-0"
    schedulers: tuple[str, ...] = ()  # endpoints of schedulers' worker sockets; empty: the run directory's
    key_file: str = ""  # this service's secret key, for tcp:// endpoints
    server_key: str = ""  # the scheduler's public key; both are paths
    model: str = ""  # a folder, a .gguf file or a hub id; empty: the packaged SmolLM2
    served_model_name: str = ""
    runner: str = "torch"  # torch, oracle, simulated
    device: str = "auto"  # auto, cpu, cuda
    tensor_parallel_size: int = 1  # the only size, as of pipeline_parallel_size: vLLM's names are taken, and others refused
    pipeline_parallel_size: int = 1
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    quantization: str = "auto"  # auto: as the checkpoint is; fp8: linears are rounded to it
    kv_cache_dtype: str = "auto"  # auto: dtype; fp8
    load_format: str = "auto"  # auto, safetensors, gguf, dummy
    attention: str = "auto"  # auto, torch, triton, flash_attn
    enforce_eager: bool = False  # no CUDA graphs
    filter_kernel: bool = True  # on a card, top-k, top-p and min-p by a kernel of ours instead of torch
    pack_prefixes: bool = True  # on a card, sequences of one step read a prefix that they share once for several of them
    block_size: int = 16
    num_gpu_blocks: int = 0  # 0: from gpu_memory_utilization
    num_cpu_blocks: int = 0
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 0  # 0: `step_tokens`
    max_model_len: int = 0  # 0: min(4096, the model's)
    seed: int = 0  # of dummy weights
    threads: int = 0  # CPU threads of the model; 0: chosen
    step_time: float = 0.002  # of the simulated runner, seconds
    log_level: str = "info"
    log_format: str = "text"
    telemetry: str = ""
    otlp_traces_endpoint: str = ""  # URL of an OpenTelemetry collector; empty: no traces
    times: Times = field(default_factory=Times)

    def step_tokens(self, *, cpu: bool = False) -> int:
        """Tokens of one step: the setting, or what suits a model on a card or on the CPU."""
        return self.max_num_batched_tokens or (CPU_STEP_TOKENS if cpu else STEP_TOKENS)
