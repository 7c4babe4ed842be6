"""What a model's requests have shown since the frontend's start: counts and distributions for /metrics. No I/O, no clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.series import Histogram, Series

if TYPE_CHECKING:
    from frontend.entries import Entry

ELSEWHERE = -1.0  # `Entry.first_token` of a request that another frontend gave its first token


class Measures:
    """One model's. The journal fills `gaps` and `tokens` with each row of tokens, so they are all a token costs.

    gaps: when a choice had its last token -> choices that had it then and have got another one in this message. Rows of
    one step mostly share that time, so a step of many rows is a few bisections.
    """

    def __init__(self) -> None:
        self.gaps: dict[float, int] = {}
        self.tokens = 0  # committed
        self._prompt_tokens = 0  # of requests with a first token
        self._reasons = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self._first_token = Histogram("vllm:time_to_first_token_seconds")
        self._inter_token = Histogram("vllm:inter_token_latency_seconds")
        self._per_token = Histogram("vllm:request_time_per_output_token_seconds")
        self._whole = Histogram("vllm:e2e_request_latency_seconds")
        self._queue = Histogram("vllm:request_queue_time_seconds")
        self._prefill = Histogram("vllm:request_prefill_time_seconds")
        self._decode = Histogram("vllm:request_decode_time_seconds")
        self._inference = Histogram("vllm:request_inference_time_seconds")
        self._prompt_lengths = Histogram("vllm:request_prompt_tokens")
        self._output_lengths = Histogram("vllm:request_generation_tokens")
        self._computed = Histogram("vllm:request_prefill_kv_computed_tokens")
        self._longest = Histogram("vllm:request_max_num_generation_tokens")
        self._n = Histogram("vllm:request_params_n")
        self._max_tokens = Histogram("vllm:request_params_max_tokens")

    def step(self, now: float) -> None:
        """Count what `gaps` holds; to be called at the end of each message of tokens."""
        for last, rows in self.gaps.items():
            self._inter_token.observe(now - last, rows)
        self.gaps.clear()

    def begun(self, entry: Entry, now: float) -> None:
        """The request has its first token."""
        self._prompt_tokens += entry.prompt_tokens
        self._first_token.observe(now - entry.arrived)

    def ended(self, entry: Entry, now: float) -> None:
        """The request is over, for whatever reason; to be called once. What moved to another frontend is counted there."""
        if entry.moved or not entry.choices:
            return
        reasons = entry.endings
        for reason in reasons:
            self._reasons[reason] += 1
        if not {"stop", "length"}.issuperset(reasons):
            return
        lengths = [len(choice.tokens) for choice in entry.choices]
        self._whole.observe(now - entry.arrived)
        self._prompt_lengths.observe(entry.prompt_tokens)
        self._computed.observe(entry.prompt_tokens - max(entry.cached, 0))
        for length in lengths:
            self._output_lengths.observe(length)
        self._longest.observe(max(lengths))
        self._n.observe(len(lengths))
        self._max_tokens.observe(entry.new.params.max_tokens)
        if entry.first_token > 0:
            decode = max(choice.at for choice in entry.choices) - entry.first_token
            self._decode.observe(decode)
            if max(lengths) > 1:
                self._per_token.observe(decode / (max(lengths) - 1))
            if entry.queued >= 0:
                prefill = max(entry.first_token - entry.submitted - entry.queued, 0.0)
                self._queue.observe(entry.queued)
                self._prefill.observe(prefill)
                self._inference.observe(prefill + decode)

    def series(self, model: str) -> list[Series]:
        """All of it under the model's name."""
        counters = {"vllm:prompt_tokens": self._prompt_tokens, "vllm:generation_tokens": self.tokens}
        histograms = [value for value in vars(self).values() if isinstance(value, Histogram)]
        return [
            *(Series(family, [model], float(count)) for family, count in counters.items()),
            *(Series("vllm:request_success", [model, reason], float(count)) for reason, count in self._reasons.items()),
            *(histogram.series([model]) for histogram in histograms),
            self._inter_token.series([model], "vllm:time_per_output_token_seconds"),
        ]
