"""Every setting of every service: what it means, its unit, its bounds. Defaults stand in each service's settings.py.

Names that vLLM's users know mean the same here.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.log_format import FORMATS

UP = "up"
TABLES = ("frontend", "scheduler", "worker", "admin", UP)  # of a configuration file
UP_OWN = ("workers", "frontends", "host", "port", "admin_port", "shutdown_timeout")  # settings that `up` acts on itself


@dataclass(frozen=True)
class Flag:
    """A setting's description.

    `empty` says what the empty or zero default stands for, `low` and `high` bound a number, `own` keeps the setting
    out of the environment that all services share, `name` overrides the flag made from the field's name.
    """

    help: str
    empty: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    own: bool = False
    hidden: bool = False
    name: str = ""


FLAGS: dict[str, Flag] = {
    # where things are
    "run_dir": Flag("Folder of sockets, logs and service files."),
    "name": Flag("Name of this service in logs, `ps` and metrics.", own=True),
    "schedulers": Flag("Endpoint of a scheduler, ipc:// or tcp://; may be repeated.", own=True, name="--scheduler"),
    "bind_frontends": Flag("Endpoint where frontends are awaited.", empty="in the run directory", own=True),
    "bind_workers": Flag("Endpoint where workers are awaited.", empty="in the run directory", own=True),
    "key_file": Flag("File with this service's secret key, for tcp:// links (`pagewire keys`).", empty="none", own=True),
    "server_key": Flag("File with the scheduler's public key.", empty="none", own=True),
    "allow_file": Flag("File with the public keys that may connect, and the role of each.", empty="none", own=True),
    "telemetry": Flag("Endpoint of the admin server's collector.", empty="in the run directory"),
    "otlp_traces_endpoint": Flag("URL of an OpenTelemetry collector (OTLP/HTTP) that gets spans of every request.", empty="no traces"),
    "log_level": Flag("Least level that is logged.", choices=("debug", "info", "warning", "error")),
    "log_format": Flag("How a line of the log looks: for people, or one JSON object.", choices=FORMATS),
    "times": Flag("Factor on every time constant (for tests).", hidden=True, name="--times-factor"),
    # frontend
    "host": Flag("Address to listen on."),
    "port": Flag("Port to listen on; 0 takes a free one and prints it.", low=0, high=65535),
    "listen_fd": Flag("A listening socket handed over by a supervisor.", low=-1, own=True, hidden=True),
    "tokenizer": Flag("Folder or .gguf file of the tokenizer.", empty="asked of a worker"),
    "served_model_name": Flag("Name of the model in the API.", empty="the model's own"),
    "shutdown_timeout": Flag("Seconds that streams get to end after SIGTERM.", low=0),
    "drain_timeout": Flag("Seconds that streams get to end when the frontend is drained or rolled.", low=0),
    "max_body": Flag("Bytes of one HTTP request body.", low=1024),
    "api_key_file": Flag("File with the API keys, one line NAME KEY each.", empty="none"),
    "auth": Flag("Whether an address that other hosts reach needs API keys."),
    "cors_origins": Flag("Origins whose pages may use the API, with commas between.", empty="none"),
    "ssl_certfile": Flag("Certificate chain (PEM): serve HTTPS.", empty="plain HTTP"),
    "ssl_keyfile": Flag("Private key (PEM) of the certificate.", empty="in the certificate's file"),
    # model and worker
    "model": Flag("Model folder, .gguf file or hub id.", empty="the packaged SmolLM2-135M-Instruct"),
    "runner": Flag("What computes the steps.", choices=("torch", "oracle", "simulated")),
    "device": Flag("Device of the model.", choices=("auto", "cpu", "cuda")),
    "tensor_parallel_size": Flag("Ranks that share every layer; only 1 today.", low=1, high=1),
    "pipeline_parallel_size": Flag("Ranks that have some layers each; only 1 today.", low=1, high=1),
    "dtype": Flag("Type of weights and activations; auto keeps 4-bit files packed.", choices=("auto", "float32", "bfloat16", "float16")),
    "quantization": Flag("Weights of linears; fp8 rounds those of an unquantised model.", choices=("auto", "fp8")),
    "kv_cache_dtype": Flag("Type of cached keys and values; auto is that of activations.", choices=("auto", "fp8")),
    "load_format": Flag("Format of the weights; dummy makes random ones.", choices=("auto", "safetensors", "gguf", "dummy")),
    "attention": Flag("Attention backend.", choices=("auto", "torch", "triton", "flash_attn")),
    "enforce_eager": Flag("Launch every step kernel by kernel, without CUDA graphs."),
    "filter_kernel": Flag("On a card, filter by top-k, top-p and min-p with a kernel that sorts nothing, instead of torch."),
    "pack_prefixes": Flag("On a card, let sequences that share a prefix read it together in a decode step."),
    "block_size": Flag("Tokens of one KV block.", low=1, high=4096),
    "num_gpu_blocks": Flag("KV blocks on the device.", empty="what memory allows", low=0),
    "num_cpu_blocks": Flag("KV blocks in host memory, for swapping.", low=0),
    "gpu_memory_utilization": Flag("Share of the device's memory to use, 0 to 1.", low=0.0, high=1.0),
    "max_num_seqs": Flag("Sequences that run at once.", low=1, high=65536),
    "max_num_batched_tokens": Flag("Tokens of one step.", empty="8192, on a CPU 512", low=0, high=1 << 20),
    "max_model_len": Flag("Tokens of prompt and output together.", empty="4096, or less if the model's is", low=0),
    "seed": Flag("Seed of dummy weights.", low=0),
    "threads": Flag("CPU threads of the model.", empty="chosen by the cores", low=0),
    "step_time": Flag("Seconds of a step of the simulated runner.", low=0.0),
    # scheduler
    "policy": Flag("Order of waiting requests.", choices=("fcfs", "priority")),
    "depth": Flag("Plans in flight per worker.", empty="by round trip and step time", low=0, high=64),
    "preemption": Flag("What becomes of a preempted sequence's blocks.", choices=("auto", "recompute", "swap")),
    "routing": Flag("Which of a model's workers a request goes to.", choices=("prefix", "load", "round-robin")),
    "max_num_partial_prefills": Flag("Prompts that are computed in parts at once.", empty="any number", low=0),
    "check_when_idle": Flag("Verify all block accounts when everything has come to rest."),
    "enable_prefix_caching": Flag("Reuse the blocks of equal prefixes."),
    "long_prefill_token_threshold": Flag("Tokens of one prompt in one step.", empty="as many as the step holds", low=0),
    "max_waiting_requests": Flag("Requests that may wait; more are refused with 429.", low=1),
    "max_waiting_tokens": Flag("Prompt tokens that may wait; more are refused with 429.", low=1),
    "standby": Flag("Stand by until the active scheduler has fallen silent; needs endpoints of its own.", own=True),
    "hash_key_file": Flag("File with the 16-byte key of block hashes.", empty="in the run directory"),
    # up and admin
    "admin_port": Flag("Port of the admin server, on loopback; 0 takes a free one.", low=0, high=65535),
    "admin_hosts": Flag("Names that requests may call the admin server by, besides loopback's, with commas between.", empty="none"),
    "api": Flag("URL of the API that the live page's prompts go to.", empty="none", own=True),
    "workers": Flag("Workers to start.", low=1, high=64),
    "frontends": Flag("Frontend processes that share the port.", low=1, high=64),
}
