"""Everything that can be set about a frontend; the command line, environment and file fill it (`cli.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from protocol.times import Times


@dataclass(frozen=True)
class FrontendSettings:
    """Endpoints are ZeroMQ's; sizes are in bytes, durations in seconds."""

    run_dir: Path
    name: str = "frontend-0"
    schedulers: tuple[str, ...] = ()  # endpoints of schedulers' frontend sockets; empty: the run directory's
    key_file: str = ""  # this service's secret key, for tcp:// endpoints
    server_key: str = ""  # the scheduler's public key; both are paths
    host: str = "127.0.0.1"
    port: int = 8000
    listen_fd: int = -1  # a listening socket handed over by the supervisor; −1: bind host and port
    tokenizer: str = ""  # a path; empty: asked for over the wire
    served_model_name: str = ""
    shutdown_timeout: float = 3.0
    drain_timeout: float = 300.0  # of streams after SIGUSR2 (`pagewire drain`, `roll`)
    max_body: int = 16 << 20
    api_key_file: str = ""  # lines NAME KEY; empty: no keys
    auth: bool = True  # false: without keys, other hosts may use the API as well
    cors_origins: str = ""  # origins, with commas between; empty: CORS is off
    ssl_certfile: str = ""
    ssl_keyfile: str = ""
    log_level: str = "info"
    log_format: str = "text"
    telemetry: str = ""  # endpoint; empty: the run directory's
    otlp_traces_endpoint: str = ""  # URL of an OpenTelemetry collector; empty: no traces
    times: Times = field(default_factory=Times)
