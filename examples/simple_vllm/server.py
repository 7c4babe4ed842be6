"""The engine behind HTTP: POST /generate {"prompt": "…", "max_tokens": 20}.

    python examples/simple_vllm/server.py --port 8080

One thread owns the engine and does nothing but steps; HTTP handlers hand it requests and wait for the answer.
Requests that arrive while others run join the batch at its next step.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.routing import Route

from simple_engine import SimpleLLMEngine
from simple_scheduler import Request


class EngineThread:
    """Runs an engine: `submit` from any thread, one future for each request."""

    def __init__(self, engine: SimpleLLMEngine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[tuple[str, int, Future[Request]] | None] = queue.SimpleQueue()
        self._pending: dict[str, Future[Request]] = {}
        self._thread = threading.Thread(target=self._run, name="engine")

    def start(self) -> None:
        """Begin to take requests."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step under way; what is unfinished fails."""
        self._inbox.put(None)
        self._thread.join()

    def submit(self, prompt: str, max_tokens: int) -> Future[Request]:
        """The future of a request's end. It raises ValueError for what cannot be served."""
        future: Future[Request] = Future()
        self._inbox.put((prompt, max_tokens, future))
        return future

    def _run(self) -> None:
        try:
            while self._take():
                for request in self._engine.step():
                    self._pending.pop(request.id).set_result(request)
        finally:
            for future in self._pending.values():
                future.set_exception(RuntimeError("the server stops"))

    def _take(self) -> bool:
        """Take what has arrived, waiting for it if there is nothing else to do. False: stop."""
        while not self._inbox.empty() or not self._engine.has_unfinished_requests():
            arrived = self._inbox.get()
            if arrived is None:
                return False
            prompt, max_tokens, future = arrived
            try:
                self._pending[self._engine.add_request(prompt, max_tokens)] = future
            except Exception as error:  # whatever is wrong with one request is its asker's alone
                future.set_exception(error)
        return True


def app(engine: SimpleLLMEngine) -> Starlette:
    """The ASGI application around an engine."""
    thread = EngineThread(engine)

    async def generate(http: HttpRequest) -> JSONResponse:
        try:
            body: dict[str, Any] = json.loads(await http.body())
            prompt, max_tokens = body["prompt"], body.get("max_tokens", 100)
            if not isinstance(prompt, str) or type(max_tokens) is not int:
                raise ValueError("prompt must be a string and max_tokens a whole number")
            prompt.encode()  # half of a surrogate pair is no text
            request = await run_in_threadpool(thread.submit(prompt, max_tokens).result)
        except (ValueError, TypeError, RecursionError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        except KeyError as error:
            return JSONResponse({"error": f"{error} is missing"}, status_code=400)
        return JSONResponse({"request_id": request.id, "text": request.text, "tokens_generated": len(request.generated)})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        thread.start()
        try:
            yield
        finally:
            thread.stop()

    return Starlette(routes=[Route("/generate", generate, methods=["POST"])], lifespan=lifespan)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder, .gguf file or hub id; none: the packaged SmolLM2")
    parser.add_argument("--max-batch-size", type=int, default=4)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    arguments = parser.parse_args()
    uvicorn.run(app(SimpleLLMEngine(arguments.model, arguments.max_batch_size)), host=arguments.host, port=arguments.port)
