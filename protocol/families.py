"""The metric families that services fill: names, labels, buckets. What is the same as vLLM's has vLLM's name (`vllm:…`).

`/metrics` shows these, and beside them every other figure that services publish (`pagewire/metrics.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True)
class Family:
    """A metric family. A counter's samples are called `name_total`; a histogram's `name_bucket`, `name_sum`, `name_count`.

    Services do not tell the last label of their families, `name`: it is their own name. So a series is of one process, and
    what it counts begins anew only when that process does.
    """

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    help: str
    labels: tuple[str, ...] = ("model_name", "name")
    bounds: tuple[float, ...] = ()  # of a histogram's buckets, upper, ascending; +Inf comes on top


def _decades(first: int, last: int, steps: tuple[float, ...]) -> tuple[float, ...]:
    """Each step times each power of ten from 10**first up to, not including, 10**last."""
    return tuple(chain.from_iterable([round(step * 10.0**power, 9) for step in steps] for power in range(first, last)))


FINE = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
# Tokens may come every millisecond or faster: from 0.1 ms on, ten buckets a decade up to a second.
TOKEN_SECONDS = (*_decades(-4, 0, FINE), 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
FIRST_TOKEN_SECONDS = (*_decades(-3, 1, (1, 1.5, 2, 3, 4, 5, 6, 8)), 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
REQUEST_SECONDS = (*_decades(-3, 2, (1, 2, 3, 5, 8)), 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
TOKENS = _decades(0, 6, (1, 2, 5))
STEP_TOKENS = tuple(float(2**power) for power in range(15))
CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)

FAMILIES = {
    family.name: family
    for family in (
        # a scheduler's
        Family("vllm:num_requests_running", "gauge", "Sequences that have a slot of a worker."),
        Family("vllm:num_requests_waiting", "gauge", "Sequences that wait for a slot."),
        Family(
            "vllm:kv_cache_usage_perc", "gauge", "Share of the KV blocks in use; 1 is all. Cached blocks that nobody uses do not count."
        ),
        Family("vllm:prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache."),
        Family("vllm:prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache."),
        Family("vllm:num_preemptions", "counter", "Sequences that lost their slot or blocks to others."),
        Family("vllm:iteration_tokens_total", "histogram", "Tokens computed in a step, prompt and output together.", bounds=STEP_TOKENS),
        # a frontend's
        Family("vllm:prompt_tokens", "counter", "Prompt tokens of requests that have their first token."),
        Family("vllm:generation_tokens", "counter", "Tokens committed."),
        Family(
            "vllm:request_success",
            "counter",
            "Outputs that have ended, by reason: stop, length, abort (the client has gone, or the frontend has), error.",
            ("model_name", "finished_reason", "name"),
        ),
        Family(
            "vllm:time_to_first_token_seconds",
            "histogram",
            "From a request's arrival to its first token.",
            bounds=FIRST_TOKEN_SECONDS,
        ),
        Family(
            "vllm:inter_token_latency_seconds",
            "histogram",
            "Between a token's arrival at the frontend and that of the one before.",
            bounds=TOKEN_SECONDS,
        ),
        Family(
            "vllm:time_per_output_token_seconds",
            "histogram",
            "The same as vllm:inter_token_latency_seconds, under its older name.",
            bounds=TOKEN_SECONDS,
        ),
        Family(
            "vllm:request_time_per_output_token_seconds",
            "histogram",
            "Mean time between the tokens of a request that has ended.",
            bounds=TOKEN_SECONDS,
        ),
        Family("vllm:e2e_request_latency_seconds", "histogram", "From a request's arrival to its end.", bounds=REQUEST_SECONDS),
        Family("vllm:request_queue_time_seconds", "histogram", "From arrival to the first plan that runs it.", bounds=REQUEST_SECONDS),
        Family("vllm:request_prefill_time_seconds", "histogram", "From there to the first token.", bounds=REQUEST_SECONDS),
        Family("vllm:request_decode_time_seconds", "histogram", "From the first token to the last.", bounds=REQUEST_SECONDS),
        Family("vllm:request_inference_time_seconds", "histogram", "Prefill and decode together.", bounds=REQUEST_SECONDS),
        Family("vllm:request_prompt_tokens", "histogram", "Prompt tokens of a request that has ended.", bounds=TOKENS),
        Family("vllm:request_generation_tokens", "histogram", "Tokens of an output that has ended.", bounds=TOKENS),
        Family("vllm:request_prefill_kv_computed_tokens", "histogram", "Prompt tokens not found in the prefix cache.", bounds=TOKENS),
        Family("vllm:request_max_num_generation_tokens", "histogram", "Tokens of a request's longest output.", bounds=TOKENS),
        Family("vllm:request_params_n", "histogram", "Outputs asked for.", bounds=CHOICES),
        Family("vllm:request_params_max_tokens", "histogram", "max_tokens, asked for or by default.", bounds=TOKENS),
        Family(
            "pagewire_http_requests",
            "counter",
            "HTTP requests that have ended, each once: by path, status sent, and how it ended (ok, or the error's code).",
            ("path", "status", "code", "name"),
        ),
        Family(
            "pagewire_http_request_duration_seconds",
            "histogram",
            "From an HTTP request's header to the last byte of its answer.",
            ("path", "name"),
            REQUEST_SECONDS,
        ),
    )
}
