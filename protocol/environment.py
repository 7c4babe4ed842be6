"""Variables of the environment that look like ours and are not: a misspelt setting must not be ignored in silence."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from protocol.flags import FLAGS

PREFIX = "PAGEWIRE_"
OTHERS = (  # that are no settings of a service
    *("CONFIG", "URL", "ADMIN_URL", "CACHE"),
    *("PARENT", "CHAOS", "KILL", "ORACLE_STEP_TIME", "ORACLE_MARKS", "SIMULATED_PER_TOKEN", "SIMULATED_PER_KV_TOKEN"),
)
_EACH = "name telemetry log_level log_format times"
_TRAFFIC = f"{_EACH} key_file otlp_traces_endpoint"
OF_ROLE = {  # what each role reads under its own name as well; the protocol imports no `settings.py`, a test compares
    "frontend": f"{_TRAFFIC} schedulers server_key host port listen_fd tokenizer served_model_name shutdown_timeout drain_timeout max_body"
    " api_key_file auth cors_origins ssl_certfile ssl_keyfile",
    "scheduler": f"{_TRAFFIC} bind_frontends bind_workers allow_file policy depth max_num_seqs max_num_batched_tokens enable_prefix_caching"
    " long_prefill_token_threshold max_num_partial_prefills preemption routing check_when_idle max_waiting_requests max_waiting_tokens"
    " hash_key_file standby",
    "worker": f"{_TRAFFIC} schedulers server_key model served_model_name runner device tensor_parallel_size pipeline_parallel_size dtype"
    " quantization kv_cache_dtype load_format attention enforce_eager filter_kernel pack_prefixes block_size num_gpu_blocks"
    " num_cpu_blocks gpu_memory_utilization max_num_seqs max_num_batched_tokens max_model_len seed threads step_time",
    "admin": f"{_EACH} admin_port admin_hosts listen_fd api",
}


def known_variables() -> set[str]:
    """The names that somebody reads, without PAGEWIRE_."""
    return {*(name for meant in _spellings().values() for name in meant), *OTHERS}


def unknown_variables(names: Iterable[str]) -> list[str]:
    """A line for each name that begins like ours and is read by nobody, with the nearest that is. Values are not told."""
    known, spellings = known_variables(), _spellings()
    lines = []
    for name in sorted({name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)} - known):
        near = get_close_matches(name, {*spellings, *OTHERS}, 1)
        meant = " or ".join(PREFIX + variable for near_name in near for variable in spellings.get(near_name, near))
        lines.append(f"the environment's {PREFIX}{name} is no setting and is ignored" + (f"; did you mean {meant}?" if meant else ""))
    return lines


def _spellings() -> dict[str, list[str]]:
    """Ways to name a setting, and the variables that are so meant: without the role that it needs, or with a role that lacks it."""
    found: dict[str, list[str]] = {}
    for name, flag in FLAGS.items():
        roles = [role for role, settings in OF_ROLE.items() if name in settings.split()]
        under_roles = [f"{role}_{name}".upper() for role in roles]
        shared = name.upper()
        found |= {variable: [variable] for variable in under_roles}
        found[shared] = under_roles if flag.own else [shared]
        for role in OF_ROLE:
            found.setdefault(f"{role}_{name}".upper(), found[shared])
    return found
