"""Everything that can be set about a scheduler; the command line, environment and file fill it (`cli.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from protocol.times import Times


@dataclass(frozen=True)
class SchedulerSettings:
    """Endpoints are ZeroMQ's, sizes are in tokens or blocks, durations in seconds."""

    run_dir: Path
    name: str = "scheduler-0"
    bind_frontends: str = ""  # endpoint; empty: the run directory's
    bind_workers: str = ""
    key_file: str = ""  # secret key, for tcp:// endpoints
    allow_file: str = ""  # which public keys may connect, and as what
    policy: str = "fcfs"
    depth: int = 0  # plans in flight per worker; 0: by measurement
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 0  # 0: what each worker announces
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0  # 0: a prefill chunk may fill the step
    max_num_partial_prefills: int = 0  # prompts under way at once; 0: any number
    preemption: str = "auto"  # recompute, swap, or whichever is predicted to be cheaper
    routing: str = "prefix"  # among workers of one model: by cached prefix and load, by load, or round-robin
    check_when_idle: bool = True  # verify all accounts whenever everything has come to rest, and a worker's when it is drained
    max_waiting_requests: int = 10_000
    max_waiting_tokens: int = 50_000_000
    hash_key_file: str = ""
    standby: bool = False  # wait until workers have been without an active scheduler for the standby time
    log_level: str = "info"
    log_format: str = "text"
    telemetry: str = ""
    otlp_traces_endpoint: str = ""  # URL of an OpenTelemetry collector; empty: no traces
    times: Times = field(default_factory=Times)
