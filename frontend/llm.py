"""The offline API: the same services, asked from a program instead of over HTTP.

    LLM             prompts in, outputs out
    AsyncLLMEngine  streams under asyncio
    LLMEngine       add requests, take steps

Each starts a scheduler and a worker of its own, or joins those of a run directory (`run_dir=`).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from frontend.async_engine import AsyncLLMEngine, RequestFailed
from frontend.background import Program
from frontend.client import Model
from frontend.llm_engine import LLMEngine, StepOutput
from frontend.offline import CompletionOutput, Prepared, RequestOutput, SamplingParams, prepare, prepare_chat
from frontend.own_services import ServiceDied
from frontend.prompts import Prompt, each
from protocol.service import CannotRun

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

Messages = list[dict[str, Any]]

logging.getLogger("frontend").addHandler(logging.NullHandler())  # as in any library: a program that wants no log sees none


class LLM(Program):
    """Prompts in, outputs out: `LLM(model).generate(prompts, SamplingParams(max_tokens=64))`.

    Settings as `AsyncLLMEngine`'s. Raises TypeError and ValueError for those, ServiceDied, CannotRun.
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The outputs of each prompt, in order. `use_tqdm`: show progress on a terminal.

        A prompt is a text, a list of token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
        Raises TypeError and ValueError for what cannot be asked, RequestFailed, ServiceDied; RuntimeError after `close`.
        """
        every = each(prompts)
        params = _spread(sampling_params, len(every))

        def make(model: Model, i: int) -> Prepared:
            return prepare(model, every[i], params[i], False, "prompts")

        return self._background.run(self._all(make, len(every), use_tqdm))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """The answers to one conversation or several, as `generate`.

        options: `add_generation_prompt`, `continue_final_message`, `chat_template_kwargs`.
        """
        if not isinstance(messages, list | tuple):
            raise ValueError(f"messages: a list of messages, or a list of such lists, not {type(messages).__name__}")
        every: list[Any] = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        params = _spread(sampling_params, len(every))

        def make(model: Model, i: int) -> Prepared:
            return prepare_chat(model, every[i], params[i], options)

        return self._background.run(self._all(make, len(every), use_tqdm))

    async def _all(self, make: Callable[[Model, int], Prepared], count: int, show: bool) -> list[RequestOutput]:
        engine = self._background.engine
        if not count:
            return []
        model = engine.model()
        progress = _Progress(count, show and sys.stderr.isatty())
        done: dict[int, RequestOutput] = {}
        async for i, output in engine.outputs(engine.prepared(lambda i: make(model, i), count)):
            if output.finished:
                done[i] = output
                progress.more(sum(len(one.token_ids) for one in output.outputs))
        progress.end()
        return [done[i] for i in range(count)]


class _Progress:
    """One line on a terminal: how many are done, and how fast tokens come."""

    def __init__(self, total: int, show: bool) -> None:
        self._total, self._show = total, show
        self._began = time.monotonic()
        self._done = self._tokens = 0

    def more(self, tokens: int) -> None:
        """A request is done."""
        self._done += 1
        self._tokens += tokens
        if self._show:
            rate = self._tokens / max(time.monotonic() - self._began, 1e-6)
            filled = 30 * self._done // self._total
            print(f"\r[{'#' * filled:<30}] {self._done}/{self._total} requests, {rate:,.0f} tokens/s", end="", file=sys.stderr)

    def end(self) -> None:
        """All are done."""
        if self._show:
            print(file=sys.stderr)


def _spread(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(isinstance(one, SamplingParams) for one in params):
        raise TypeError("sampling_params: SamplingParams, or a list with one for each prompt")
    if len(params) != count:
        raise ValueError(f"sampling_params: {len(params)} of them for {count} prompts")
    return list(params)
