"""Sums over the requests that a frontend has answered, for telemetry."""

from __future__ import annotations

from dataclasses import dataclass

from frontend.entries import Entry


@dataclass
class Totals:
    """Of requests that are done, since the start."""

    finished: int = 0
    failed: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    request_seconds: float = 0.0  # from the request's arrival to its last token, of the finished ones
    first_token_seconds: float = 0.0  # from the request's arrival to the first token, of the finished ones
    first_token_requests: int = 0
    later_token_seconds: float = 0.0  # from the first token to the last of each of their choices
    later_tokens: int = 0  # and the tokens behind each choice's first

    def ended(self, entry: Entry, now: float) -> None:
        """The request is over, for whatever reason; to be called once."""
        self.prompt_tokens += entry.prompt_tokens
        self.generation_tokens += sum(len(choice.tokens) for choice in entry.choices)
        if entry.error is not None:
            self.failed += 1
        elif entry.ended and not any(choice.finish_reason == "abort" for choice in entry.choices):
            self.finished += 1
            self._time(entry, now)
        else:
            self.aborted += 1

    def _time(self, entry: Entry, now: float) -> None:
        """A finished request ended with its last token, or `now` if it had none of a time known."""
        self.request_seconds += (max((choice.at for choice in entry.choices), default=0.0) or now) - entry.arrived
        if entry.first_token > 0:
            self.first_token_seconds += entry.first_token - entry.arrived
            self.first_token_requests += 1
            self.later_token_seconds += sum(choice.at - entry.first_token for choice in entry.choices if choice.at)
            self.later_tokens += sum(max(0, len(choice.tokens) - 1) for choice in entry.choices)

    def figures(self) -> dict[str, float]:
        """Their names in telemetry (`pagewire/metrics.py`)."""
        return {
            "requests_finished": self.finished,
            "requests_failed": self.failed,
            "requests_aborted": self.aborted,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "request_seconds": self.request_seconds,
            "first_token_seconds": self.first_token_seconds,
            "first_token_requests": self.first_token_requests,
            "later_token_seconds": self.later_token_seconds,
            "later_tokens": self.later_tokens,
        }
