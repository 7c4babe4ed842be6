"""Requests are added at any time, and steps taken: the offline API of programs that schedule themselves."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from frontend.async_engine import RequestFailed
from frontend.background import Program
from frontend.offline import Prepared, SamplingParams, check_types, prepare
from frontend.own_services import ServiceDied
from frontend.prompts import Prompt


@dataclass(frozen=True)
class StepOutput:
    """What a step brought to one output of a request."""

    request_id: str
    text: str  # new text
    tokens: list[int]  # new tokens
    finish_reason: str | None  # None while it goes on; "error" with the reason as text, "abort"
    index: int = 0  # which of the request's n outputs


class LLMEngine(Program):
    """Requests are added at any time; each `step` tells what has come. Settings as `AsyncLLMEngine`'s."""

    def __init__(self, model: str = "", **settings: Any) -> None:
        super().__init__(model, **settings)
        self._steps: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self._unfinished: dict[str, int] = {}  # request → outputs that go on
        self._tasks: dict[str, asyncio.Task[None]] = {}  # request → who follows it; the background's thread alone looks at them
        self._added = 0

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Take a request; returns its id.

        Raises TypeError and ValueError for what cannot be asked (log probabilities among it: a step has none), and for an id that
        is in use; RuntimeError after `close`, and in a fork of the process.
        """
        self._background.check()
        check_types(sampling_params, request_id)
        params = sampling_params or SamplingParams()
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(params, field) is not None:
                raise ValueError(f"{field}: the steps of an LLMEngine have none; use LLM or AsyncLLMEngine")
        engine = self._background.engine
        if request_id is None:
            while f"request-{self._added}" in self._unfinished:  # that was given
                self._added += 1
            request_id = f"request-{self._added}"
        if request_id in self._unfinished:
            raise ValueError(f"request_id: {request_id} is in use")
        prepared = prepare(engine.model(), prompt, params, True)
        self._added += 1
        self._unfinished[request_id] = params.n
        self._background.begin(self._follow(request_id, prepared))
        return request_id

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """End a request, or several; ids that are not in use are passed over.

        The last step of each has the reason "abort"; with that its id is free again.
        """
        self._background.run(self._abort({request_id} if isinstance(request_id, str) else {*request_id}))

    def has_unfinished_requests(self) -> bool:
        """Whether a step would bring something."""
        return bool(self._unfinished)

    def step(self) -> list[StepOutput]:
        """Wait for something to come, and return all that has. Empty if nothing is unfinished.

        Raises RuntimeError after `close`, once every request's last step has been told, and in a fork of the process.
        """
        self._background.check_process()
        if not self._unfinished:
            self._background.check()
            return []
        steps = [self._steps.get()]
        while not self._steps.empty():
            steps.append(self._steps.get())
        for step in steps:
            if step.finish_reason is not None and step.request_id in self._unfinished:
                self._unfinished[step.request_id] -= 1
                if not self._unfinished[step.request_id] or step.finish_reason in ("error", "abort"):
                    del self._unfinished[step.request_id]
        return steps

    async def _follow(self, request_id: str, prepared: Prepared) -> None:
        told: dict[int, tuple[int, int]] = {}
        ended: set[int] = set()
        task = asyncio.current_task()
        assert task is not None
        self._tasks[request_id] = task
        try:
            async for _, output in self._background.engine.outputs(_alone(prepared)):
                for one in output.outputs:
                    characters, tokens = told.get(one.index, (0, 0))
                    if one.index in ended or (len(one.token_ids) == tokens and one.finish_reason is None):
                        continue
                    told[one.index] = len(one.text), len(one.token_ids)
                    if one.finish_reason is not None:
                        ended.add(one.index)
                    text, ids = one.text[characters:], one.token_ids[tokens:]
                    self._steps.put(StepOutput(request_id, text, ids, one.finish_reason, one.index))
        except (RequestFailed, ServiceDied, RuntimeError) as error:
            self._steps.put(StepOutput(request_id, str(error), [], "error"))
        except asyncio.CancelledError:
            aborted = request_id not in self._tasks  # `_abort` has taken it out
            text, reason = ("", "abort") if aborted else ("the engine was closed", "error")
            self._steps.put(StepOutput(request_id, text, [], reason))
            raise
        finally:
            self._tasks.pop(request_id, None)

    async def _abort(self, request_ids: set[str]) -> None:
        tasks = [self._tasks.pop(one) for one in request_ids & self._tasks.keys()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _alone(prepared: Prepared) -> AsyncIterator[list[Prepared]]:
    yield [prepared]
