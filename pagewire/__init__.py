"""The command, the supervisor, and the offline API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frontend.llm import (
        LLM,
        AsyncLLMEngine,
        CannotRun,
        CompletionOutput,
        LLMEngine,
        RequestFailed,
        RequestOutput,
        SamplingParams,
        ServiceDied,
        StepOutput,
    )

__all__ = [
    "LLM",
    "AsyncLLMEngine",
    "CannotRun",
    "CompletionOutput",
    "LLMEngine",
    "RequestFailed",
    "RequestOutput",
    "SamplingParams",
    "ServiceDied",
    "StepOutput",
]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command would otherwise wait for the HTTP API's libraries.
    if name in __all__:
        from frontend import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'pagewire' has no attribute {name!r}")
