"""Streams of outputs under asyncio: what the offline engines are made of."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from frontend.client import Client, Model
from frontend.errors import ApiError, from_failed
from frontend.offline import Prepared, RequestOutput, SamplingParams, check_types, output_of, prepare
from frontend.own_services import OwnServices
from frontend.own_settings import checked
from frontend.prompts import Prompt
from frontend.settings import FrontendSettings
from frontend.streams import Stream
from protocol.columns import unpack
from protocol.registration import new_incarnation
from protocol.rundir import RunDir
from protocol.service import CannotRun

LOOK_EVERY = 0.02  # seconds between two looks at whether the model is ready
LIVE_EVERY = 0.5  # seconds between two looks at whether the services live
CLOSED = "the engine is not started, or closed"
PREPARED = 32  # requests made at most before they are submitted


class RequestFailed(RuntimeError):
    """The services ended a request with an error."""


class AsyncLLMEngine:
    """Streams of outputs under asyncio. Use it as `async with AsyncLLMEngine() as engine`.

    settings: those of worker and scheduler, as `max_model_len=…`, where it starts its own.

    Raises TypeError for an unknown one, ValueError for one whose value cannot be, before anything is started.
    """

    def __init__(self, model: str = "", *, run_dir: str | Path | None = None, tokenizer: str = "", **settings: Any) -> None:
        if run_dir is not None and (settings or model):
            raise TypeError("a run directory's services have their settings already: give none beside run_dir")
        self._settings = checked({**settings, "model": model or None})
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
        """Start or join the services, and wait until they can be asked.

        Raises ServiceDied, CannotRun (among its reasons: no service runs in the run directory that was named).
        """
        if self._run_dir is None:
            self._own = OwnServices(self._settings)
        else:
            self._look()  # before the client makes a run directory of any folder
        run_dir = self._run_dir or self._own.run_dir  # type: ignore[union-attr]
        incarnation = new_incarnation()
        settings = FrontendSettings(run_dir, name=f"llm-{incarnation:013x}", tokenizer=self._tokenizer)
        try:
            self._client = Client(settings, incarnation)
            await self._client.start()
            while self._client.why_not_ready():
                self.check()
                self._look()
                if why := self._client.why_never_ready():
                    raise CannotRun(why)
                await asyncio.sleep(LOOK_EVERY)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Abort what runs: who waits for its outputs gets RequestFailed. End the services that were started here.

        Harmless when repeated.
        """
        await self.leave()
        await asyncio.get_running_loop().run_in_executor(None, self.end_services)

    async def leave(self) -> None:
        """The first half of `close`: abort what runs, and close the connection."""
        client, self._client = self._client, None
        if client is not None:
            await client.stop()

    def end_services(self) -> None:
        """The second half: end the services that were started here. Blocks until they have ended, some seconds if they hang."""
        own, self._own = self._own, None
        if own is not None:
            own.close()

    def check(self) -> None:
        """Raise ServiceDied if a service that was started here has ended."""
        if self._own is not None:
            self._own.check()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None, *, every_step: bool = True
    ) -> AsyncIterator[RequestOutput]:
        """The request's outputs so far, again and again until they are finished. Leaving the iteration aborts it.

        `request_id`: what the outputs call the request. `every_step`: false tells the finished ones alone.
        Raises TypeError and ValueError for what cannot be asked, RequestFailed, ServiceDied.
        """
        check_types(sampling_params, request_id)
        params = sampling_params or SamplingParams()
        model = self.model()
        async for _, output in self.outputs(self.prepared(lambda _: prepare(model, prompt, params, every_step), 1)):
            yield output if request_id is None else dataclasses.replace(output, request_id=request_id)

    async def prepared(self, make: Callable[[int], Prepared], count: int) -> AsyncIterator[list[Prepared]]:
        """make(0), …, make(count − 1), made in a thread: one at first, then ever more at a time.

        So the first are computed while others are made. Raises what `make` does.
        """
        done, size = 0, 1
        while done < count:
            part = range(done, min(done + size, count))
            yield await self.client.offload(lambda part=part: [make(i) for i in part])  # type: ignore[misc]
            done, size = part.stop, min(2 * size, PREPARED)

    async def outputs(self, parts: AsyncIterator[list[Prepared]]) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(index of the request, its output so far) whenever one has news, until all are finished.

        Parts are submitted as they come; the first news is told when all are.
        """
        eos = frozenset(unpack(self.model().info.eos).tolist())
        client = self.client
        stream = client.open()
        try:
            asked = await _submit(client, parts, stream)
            places = {entry.handle: i for i, entry in enumerate(stream.entries)}
            texts: list[dict[int, str]] = [{} for _ in asked]
            while True:
                if stream.error is not None:
                    raise RequestFailed(stream.error.message)
                ended = stream.ended
                for entry in stream.take():
                    i = places[entry.handle]
                    if entry.error is not None:
                        raise RequestFailed(from_failed(entry.error).message)
                    yield i, output_of(entry, asked[i], texts[i], eos)
                    if entry.ended:
                        client.finish(entry)
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
            raise RuntimeError(CLOSED)
        return self._client

    def _look(self) -> None:
        """Raise CannotRun if no service is left in the run directory that is to be joined."""
        if self._run_dir is not None and not RunDir(self._run_dir, make=False).services():
            raise CannotRun(f"no service runs in {self._run_dir}")

    async def _news(self, stream: Stream) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LIVE_EVERY):  # `wait_for` would lose a cancellation that comes with the news
                    return await stream.news()
            self.check()  # behind the `with`: an error of it shall not drag the timeout along


async def _submit(client: Client, parts: AsyncIterator[list[Prepared]], stream: Stream) -> list[Prepared]:
    """Submit all parts, and return what was asked: less than all if the stream is ended with an error meanwhile."""
    asked: list[Prepared] = []
    try:
        async for part in parts:
            if stream.error is not None:
                break
            client.submit([prepared.new for prepared in part], stream=stream)
            asked += part
    except (RuntimeError, asyncio.CancelledError):  # how the parts end once the client has no threads
        if stream.error is None:
            raise
    return asked
