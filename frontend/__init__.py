"""HTTP in, text out: tokenizing, the journal of each request, detokenizing. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frontend.llm import LLM, AsyncLLMEngine, LLMEngine, SamplingParams

__all__ = ["LLM", "AsyncLLMEngine", "LLMEngine", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from frontend import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'frontend' has no attribute {name!r}")
