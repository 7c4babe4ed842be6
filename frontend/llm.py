"""The offline API: the same services, asked from a program instead of over HTTP.

    LLM             prompts in, outputs out
    AsyncLLMEngine  streams under asyncio
    LLMEngine       add requests, take steps

Each starts a scheduler and a worker of its own, or joins those of a run directory (`run_dir=`).
"""

from __future__ import annotations

import asyncio
import atexit
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from frontend.client import Client, Model
from frontend.entries import NewRequest
from frontend.errors import ApiError, from_failed
from frontend.offline import CompletionOutput, Prompt, RequestOutput, SamplingParams, chat_of, output_of, request_of
from frontend.own_services import OwnServices, ServiceDied
from frontend.settings import FrontendSettings
from frontend.streams import Stream
from protocol.columns import unpack
from protocol.rundir import new_incarnation

__all__ = [
    "LLM",
    "AsyncLLMEngine",
    "CompletionOutput",
    "LLMEngine",
    "RequestFailed",
    "RequestOutput",
    "SamplingParams",
    "ServiceDied",
    "StepOutput",
]

T = TypeVar("T")
LOOK_EVERY = 0.02  # seconds between two looks at whether the model is ready
LIVE_EVERY = 0.5  # seconds between two looks at whether the services live
Messages = list[dict[str, Any]]


class RequestFailed(RuntimeError):
    """The services ended a request with an error."""


class AsyncLLMEngine:
    """Streams of outputs under asyncio. Use it as `async with AsyncLLMEngine() as engine`.

    settings: those of worker and scheduler, as `max_model_len=…`, where it starts its own. Raises TypeError for an unknown one.
    """

    def __init__(self, model: str = "", *, run_dir: str | Path | None = None, tokenizer: str = "", **settings: Any) -> None:
        if run_dir is not None and (settings or model):
            raise TypeError("a run directory's services have their settings already: give none beside run_dir")
        self._settings = {**settings, **({"model": model} if model else {})}
        self._run_dir = Path(run_dir) if run_dir is not None else None
        self._tokenizer = tokenizer
        self._own: OwnServices | None = None
        self._client: Client | None = None

    async def __aenter__(self) -> AsyncLLMEngine:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start or join the services, and wait until they can be asked. Raises ServiceDied, CannotRun."""
        if self._run_dir is None:
            self._own = OwnServices(self._settings)
        run_dir = self._run_dir or self._own.run_dir  # type: ignore[union-attr]
        incarnation = new_incarnation()
        settings = FrontendSettings(run_dir, name=f"llm-{incarnation:013x}", tokenizer=self._tokenizer)
        try:
            self._client = Client(settings, incarnation)
            await self._client.start()
            while self._client.why_not_ready():
                self.check()
                await asyncio.sleep(LOOK_EVERY)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Abort what runs, and end the services that were started here. Harmless when repeated."""
        client, self._client = self._client, None
        if client is not None:
            await client.stop()
        own, self._own = self._own, None
        if own is not None:
            await asyncio.get_running_loop().run_in_executor(None, own.close)

    def check(self) -> None:
        """Raise ServiceDied if a service that was started here has ended."""
        if self._own is not None:
            self._own.check()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, every_step: bool = True
    ) -> AsyncIterator[RequestOutput]:
        """The request's outputs so far, again and again until they are finished. Leaving the iteration aborts it.

        Raises ValueError for what cannot be asked, RequestFailed, ServiceDied.
        """
        params = sampling_params or SamplingParams()
        model = self.model()
        new = await self.client.offload(lambda: request_of(model, prompt, params, every_step))
        async for _, output in self.outputs([new], [params], [prompt if isinstance(prompt, str) else None]):
            yield output

    async def outputs(
        self, new: Sequence[NewRequest], params: Sequence[SamplingParams], prompts: Sequence[str | None]
    ) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(index of the request, its output so far) whenever one has news, until all are finished."""
        stream = self.client.submit(new)
        places = {entry.handle: i for i, entry in enumerate(stream.entries)}
        texts: list[dict[int, str]] = [{} for _ in new]
        eos = frozenset(unpack(self.model().info.eos).tolist())
        try:
            while True:
                ended = stream.ended
                for entry in stream.take():
                    i = places[entry.handle]
                    if entry.error is not None:
                        raise RequestFailed(from_failed(entry.error).message)
                    yield i, output_of(entry, params[i], texts[i], prompts[i], eos)
                if ended:
                    return
                await self._news(stream)
        finally:
            stream.close()

    def model(self) -> Model:
        """The model that is asked. Raises RequestFailed if it is not there."""
        try:
            return self.client.model(None)
        except ApiError as error:
            raise RequestFailed(error.message) from None

    @property
    def client(self) -> Client:
        """The connection. Raises RuntimeError before `start` and after `close`."""
        if self._client is None:
            raise RuntimeError("the engine is not started, or closed")
        return self._client

    async def _news(self, stream: Stream) -> None:
        while True:
            try:
                return await asyncio.wait_for(stream.news(), LIVE_EVERY)
            except TimeoutError:
                self.check()


class _Background:
    """An `AsyncLLMEngine` in a thread of its own, for programs without an event loop."""

    def __init__(self, engine: AsyncLLMEngine) -> None:
        self.engine = engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pagewire", daemon=True)
        self._thread.start()
        self._closed = False
        atexit.register(self.close)
        try:
            self.run(engine.start())
        except BaseException:
            self.close()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end in the thread; an interrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Let it run in the thread."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Close the engine and end the thread. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.engine.close()


class _Program:
    """Base of the blocking engines: a background, and its end."""

    def __init__(self, model: str = "", **settings: Any) -> None:
        self._background = _Background(AsyncLLMEngine(model, **settings))

    def close(self) -> None:
        """End the services that were started here. Done at the program's end as well."""
        self._background.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class LLM(_Program):
    """Prompts in, outputs out: `LLM(model).generate(prompts, SamplingParams(max_tokens=64))`. Settings as `AsyncLLMEngine`'s."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The outputs of each prompt (texts, or lists of token ids), in order. `use_tqdm`: show progress on a terminal.

        Raises ValueError for what cannot be asked, RequestFailed, ServiceDied.
        """
        alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        every: list[Any] = [prompts] if alone else list(prompts)
        params = _spread(sampling_params, len(every))

        def make(model: Model) -> list[NewRequest]:
            return [request_of(model, prompt, one, False) for prompt, one in zip(every, params, strict=True)]

        return self._background.run(self._all(make, params, [p if isinstance(p, str) else None for p in every], use_tqdm))

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
        every: list[Any] = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        params = _spread(sampling_params, len(every))

        def make(model: Model) -> list[NewRequest]:
            return [chat_of(model, conversation, one, options) for conversation, one in zip(every, params, strict=True)]

        return self._background.run(self._all(make, params, [None] * len(every), use_tqdm))

    async def _all(
        self, make: Callable[[Model], list[NewRequest]], params: list[SamplingParams], prompts: list[str | None], show: bool
    ) -> list[RequestOutput]:
        engine = self._background.engine
        if not params:
            return []
        model = engine.model()
        new = await engine.client.offload(lambda: make(model))
        progress = _Progress(len(new), show and sys.stderr.isatty())
        done: dict[int, RequestOutput] = {}
        async for i, output in engine.outputs(new, params, prompts):
            if output.finished:
                done[i] = output
                progress.more(sum(len(one.token_ids) for one in output.outputs))
        progress.end()
        return [done[i] for i in range(len(new))]


@dataclass(frozen=True)
class StepOutput:
    """What a step brought to one output of a request."""

    request_id: str
    text: str  # new text
    tokens: list[int]  # new tokens
    finish_reason: str | None  # None while it goes on; "error" with the reason as text
    index: int = 0  # which of the request's n outputs


class LLMEngine(_Program):
    """Requests are added at any time; each `step` tells what has come. Settings as `AsyncLLMEngine`'s."""

    def __init__(self, model: str = "", **settings: Any) -> None:
        super().__init__(model, **settings)
        self._steps: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self._unfinished: dict[str, int] = {}  # request → outputs that go on
        self._added = 0

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Take a request; returns its id. Raises ValueError for what cannot be asked, and for an id that is in use."""
        params = sampling_params or SamplingParams()
        engine = self._background.engine
        if request_id is None:
            request_id = f"request-{self._added}"
        if request_id in self._unfinished:
            raise ValueError(f"request_id: {request_id} is in use")
        new = request_of(engine.model(), prompt, params, True)
        self._added += 1
        self._unfinished[request_id] = params.n
        self._background.begin(self._follow(request_id, new, params))
        return request_id

    def has_unfinished_requests(self) -> bool:
        """Whether a step would bring something."""
        return bool(self._unfinished)

    def step(self) -> list[StepOutput]:
        """Wait for something to come, and return all that has. Empty if nothing is unfinished."""
        if not self._unfinished:
            return []
        steps = [self._steps.get()]
        while not self._steps.empty():
            steps.append(self._steps.get())
        for step in steps:
            if step.finish_reason is not None and step.request_id in self._unfinished:
                self._unfinished[step.request_id] -= 1
                if not self._unfinished[step.request_id] or step.finish_reason == "error":
                    del self._unfinished[step.request_id]
        return steps

    async def _follow(self, request_id: str, new: NewRequest, params: SamplingParams) -> None:
        told: dict[int, tuple[int, int]] = {}
        ended: set[int] = set()
        try:
            async for _, output in self._background.engine.outputs([new], [params], [None]):
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
    if len(params) != count:
        raise ValueError(f"sampling_params: {len(params)} of them for {count} prompts")
    return list(params)
