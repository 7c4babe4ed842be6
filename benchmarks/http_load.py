"""A load generator for any OpenAI-compatible server: who waits how long, and how much comes out.

    python benchmarks/http_load.py --url http://127.0.0.1:8000 --requests 200 --rate 20
    python benchmarks/http_load.py --lengths lengths.json --requests 1000 --processes 6 --ignore-eos --json out.json

Several client processes share the requests; each speaks HTTP/1.1 on raw sockets, since an ordinary client library costs
more per chunk than the server it measures. Arrivals are a Poisson process (`--rate`), evenly spaced (`--arrivals even`)
or all at once (no rate); `--concurrency` bounds how many are under way.

Figures, defined as vLLM's `bench serve` defines them (a *chunk* is an event with choices):
    TTFT  from sending the request to its first chunk           TPOT  (last chunk − first chunk) / (tokens − 1)
    ITL   between two chunks of one request, all pooled         E2E   from sending the request to its last chunk
    duration, for requests/s and tokens/s: from the first request's start to the last one's end
Times are milliseconds. Tokens are the server's own count (`usage`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import ssl
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

PERCENTILES = (50, 90, 99)
START_DELAY = 0.3  # seconds between the last client's readiness and the first arrival
WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
]


@dataclass(frozen=True)
class Request:
    """One request: when it is sent (seconds after the start), and its body."""

    at: float
    body: bytes


@dataclass
class Record:
    """What was seen of one request. Times are seconds on the monotonic clock, which all processes of a host share."""

    start: float
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    chunks: int = 0
    error: str = ""


# ---------------------------------------------------------------- one client process


class Exchange(asyncio.Protocol):
    """One request on a connection of its own: sends it, reads its response, notes when each event came."""

    def __init__(self, head: bytes, body: bytes, record: Record, stream: bool) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = head + body
        self._record = record
        self._stream = stream
        self._status = 0
        self._chunked = False
        self._left = -1  # bytes of an unchunked body still to come; negative: it goes on until the connection ends
        self._input = b""
        self._text = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            self._take(data, now)
        except (ValueError, KeyError, IndexError) as error:
            self._end(f"bad response: {error!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            if self._status and not self._chunked and self._left < 0:
                self._finish()
            else:
                self._end(f"connection lost: {exc}" if exc else "connection closed early")

    def _take(self, data: bytes, now: float) -> None:
        self._input += data
        if not self._status and not self._head():
            return
        if not self._chunked:
            payload, self._input = self._input, b""
            self._left -= len(payload)
            self._payload(payload, now)
            if self._left == 0:
                self._finish()
            return
        at, parts, over = 0, [], False
        while not over and (end := self._input.find(b"\r\n", at)) >= 0:
            size = int(self._input[at:end].split(b";")[0], 16)
            if len(self._input) < end + 4 + size:
                break
            parts.append(self._input[end + 2 : end + 2 + size])
            at, over = end + 4 + size, not size
        self._input = self._input[at:]
        self._payload(b"".join(parts), now)
        if over:
            self._finish()

    def _head(self) -> bool:
        head, found, rest = self._input.partition(b"\r\n\r\n")
        if not found:
            return False
        lines = head.lower().split(b"\r\n")
        self._status = int(lines[0].split()[1])
        headers = dict(line.split(b":", 1) for line in lines[1:])
        self._chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        self._left = int(headers.get(b"content-length", b"-1"))
        self._input = rest
        return True

    def _payload(self, data: bytes, now: float) -> None:
        self._text += data
        if not self._stream or self._status != 200:
            return
        *events, self._text = self._text.split(b"\n\n")
        record = self._record
        for event in events:
            at = event.find(b"data:")
            if at < 0:
                continue
            line = event[at + 5 :].strip()
            if line == b"[DONE]":
                continue
            if b'"usage":{' in line or b'"usage": {' in line or b'"error"' in line or not record.chunks:
                self._look(json.loads(line))
                if b'"choices":[]' in line or b'"choices": []' in line or record.error:
                    continue
            if record.chunks:
                record.gaps.append(now - record.last)
            else:
                record.first = now
            record.last = now
            record.chunks += 1

    def _look(self, body: dict[str, Any]) -> None:
        if error := body.get("error"):
            self._record.error = str(error.get("message", error))
        if usage := body.get("usage"):
            self._record.prompt_tokens = usage["prompt_tokens"]
            self._record.tokens = usage["completion_tokens"]

    def _finish(self) -> None:
        if self._status != 200:
            self._end(f"status {self._status}: {self._text[:300].decode(errors='replace')}")
            return
        if not self._stream:
            self._look(json.loads(self._text))
            self._record.first = self._record.last = time.perf_counter()
        self._end("" if self._record.last else "no chunk came")

    def _end(self, error: str) -> None:
        self._record.error = self._record.error or error
        self._transport.close()
        if not self.done.done():
            self.done.set_result(None)


async def _exchange(url: SplitResult, head: str, request: Request, start: float, limit: asyncio.Semaphore | None, stream: bool) -> Record:
    await asyncio.sleep(max(0.0, start + request.at - time.perf_counter()))
    if limit is not None:
        await limit.acquire()
    record = Record(time.perf_counter())
    try:
        loop = asyncio.get_running_loop()
        header = head.format(length=len(request.body)).encode()
        context = ssl.create_default_context() if url.scheme == "https" else None
        port = url.port or (443 if context else 80)
        _, protocol = await loop.create_connection(
            lambda: Exchange(header, request.body, record, stream), url.hostname or "", port, ssl=context
        )
        await protocol.done
    except OSError as error:
        record.error = f"cannot connect: {error}"
    finally:
        if limit is not None:
            limit.release()
    return record


def client(pipe: Connection, where: str, path: str, key: str, requests: Sequence[Request], concurrency: int, stream: bool) -> None:
    """A client process: says that it is ready, gets the start time, answers with its records."""
    url = urlsplit(where)
    head = f"POST {url.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    if key:
        head += f"Authorization: Bearer {key}\r\n"
    head += "Content-Length: {length}\r\n\r\n"

    async def main() -> list[Record]:
        limit = asyncio.Semaphore(concurrency) if concurrency else None
        pipe.send("ready")
        start = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        return await asyncio.gather(*(_exchange(url, head, request, start, limit, stream) for request in requests))

    try:
        import uvloop

        records = uvloop.run(main())
    except ImportError:
        records = asyncio.run(main())
    pipe.send(records)


# ---------------------------------------------------------------- the workload


def arrivals(kind: str, rate: float, count: int, rng: random.Random) -> list[float]:
    """When each request is sent, in seconds after the start. Rate 0: all at once."""
    if not rate:
        return [0.0] * count
    times, at = [], 0.0
    for _ in range(count):
        times.append(at)
        at += rng.expovariate(rate) if kind == "poisson" else 1.0 / rate
    return times


def lengths(args: argparse.Namespace, rng: random.Random) -> list[tuple[int, int]]:
    """(prompt, output) lengths in tokens of each request."""
    if args.lengths is None:
        return [(rng.randint(*args.input), rng.randint(*args.output)) for _ in range(args.requests)]
    pairs = [(p, o) for p, o in json.loads(args.lengths.read_text()) if p + o <= args.max_total]
    if not pairs:
        raise SystemExit(f"{args.lengths} has no pair of at most {args.max_total} tokens")
    return [pairs[i % len(pairs)] for i in range(args.requests)]


def workload(args: argparse.Namespace) -> list[Request]:
    """The requests, the same ones for the same arguments."""
    rng = random.Random(args.seed)
    sizes = lengths(args, rng)
    prefix = [rng.randrange(args.vocab) for _ in range(args.shared_prefix)]
    prompts: list[Any] = []
    for size, _ in sizes:
        if args.prompts == "ids":
            prompts.append(prefix + [rng.randrange(args.vocab) for _ in range(size)])
        else:
            prompts.append(" ".join([WORDS[i % len(WORDS)] for i in prefix] + [rng.choice(WORDS) for _ in range(size)]))
    requests = []
    for at, prompt, (_, output) in zip(arrivals(args.arrivals, args.rate, len(sizes), rng), prompts, sizes, strict=True):
        body: dict[str, Any] = {"max_tokens": output, "temperature": args.temperature}
        body |= {"messages": [{"role": "user", "content": prompt}]} if args.api == "chat" else {"prompt": prompt}
        if args.model:
            body["model"] = args.model
        if args.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if args.ignore_eos:
            body["ignore_eos"] = True
        if not args.seconds or at < args.seconds:
            requests.append(Request(at, json.dumps(body).encode()))
    return requests


# ---------------------------------------------------------------- the measurement


def measure(args: argparse.Namespace, requests: Sequence[Request]) -> list[Record]:
    """Send the requests from several processes; the records of all, by start."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    path = "/v1/chat/completions" if args.api == "chat" else "/v1/completions"
    count = max(1, min(args.processes, len(requests)))
    for i in range(count):
        ours, theirs = context.Pipe()
        share = args.concurrency // count + (i < args.concurrency % count) if args.concurrency else 0
        mine = requests[i::count]
        process = context.Process(target=client, args=(theirs, args.url, path, args.api_key, mine, share, args.stream), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            pipe.recv()
        start = time.perf_counter() + START_DELAY
        for pipe in pipes:
            pipe.send(start)
        records = [record for pipe in pipes for record in pipe.recv()]
    except EOFError:
        raise SystemExit("a client process died") from None
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    return sorted(records, key=lambda record: record.start)


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile by linear interpolation, as numpy's; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """All figures: counts, rates, and the distribution of each time in milliseconds."""
    good = [record for record in records if not record.error]
    duration = max((r.last for r in good), default=0.0) - min((r.start for r in records), default=0.0)
    tokens = sum(record.tokens for record in good)
    times = {
        "ttft": [r.first - r.start for r in good],
        "tpot": [(r.last - r.first) / (r.tokens - 1) for r in good if r.tokens > 1],
        "itl": [gap for r in good for gap in r.gaps],
        "e2e": [r.last - r.start for r in good],
    }
    result: dict[str, Any] = {
        "completed": len(good),
        "failed": len(records) - len(good),
        "duration_s": duration,
        "prompt_tokens": sum(record.prompt_tokens for record in good),
        "output_tokens": tokens,
        "chunks": sum(record.chunks for record in good),
        "requests_per_s": len(good) / duration if duration > 0 else 0.0,
        "output_tokens_per_s": tokens / duration if duration > 0 else 0.0,
        "chunks_per_s": sum(record.chunks for record in good) / duration if duration > 0 else 0.0,
    }
    for name, values in times.items():
        in_ms = [1000 * value for value in values]
        result[f"{name}_ms"] = {"mean": sum(in_ms) / len(in_ms) if in_ms else float("nan")}
        result[f"{name}_ms"] |= {f"p{p}": percentile(in_ms, p) for p in PERCENTILES}
    errors: dict[str, int] = {}
    for record in records:
        if record.error:
            errors[record.error] = errors.get(record.error, 0) + 1
    result["errors"] = errors
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"completed {result['completed']}, failed {result['failed']}, in {result['duration_s']:.2f} s")
    rates = [result[f"{name}_per_s"] for name in ("requests", "output_tokens", "chunks")]
    print("{:.2f} requests/s, {:.0f} output tokens/s, {:.0f} chunks/s".format(*rates))
    columns = ["mean", *(f"p{p}" for p in PERCENTILES)]
    print(f"{'ms':6}" + "".join(f"{column:>10}" for column in columns))
    for name in ("ttft", "tpot", "itl", "e2e"):
        print(f"{name:6}" + "".join(f"{result[f'{name}_ms'][column]:10.2f}" for column in columns))
    for error, count in list(result["errors"].items())[:5]:
        print(f"{count} × {error}")


def span(text: str) -> tuple[int, int]:
    """A number, or LOW:HIGH."""
    low, _, high = text.partition(":")
    return int(low), int(high or low)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--url", default="http://127.0.0.1:8000", help="where the server's /v1 is")
    p.add_argument("--api", choices=("completions", "chat"), default="completions")
    p.add_argument("--model", default="", help="model name; none: the server's only one")
    p.add_argument("--api-key", default="")
    p.add_argument("--requests", type=int, default=100)
    p.add_argument("--rate", type=float, default=0.0, help="requests/s; 0: all at once")
    p.add_argument("--arrivals", choices=("poisson", "even"), default="poisson")
    p.add_argument("--seconds", type=float, default=0.0, help="only the requests that arrive within so many seconds")
    p.add_argument("--concurrency", type=int, default=0, help="most requests under way; 0: no bound")
    p.add_argument("--processes", type=int, default=2, help="client processes")
    p.add_argument("--prompts", choices=("ids", "text"), default="ids", help="random token ids, or random words (chat: always words)")
    p.add_argument("--vocab", type=int, default=10_000, help="token ids are drawn below this")
    p.add_argument("--lengths", type=Path, help="JSON list of [prompt, output] lengths in tokens")
    p.add_argument("--max-total", type=int, default=4000, help="of --lengths, the pairs with at most so many tokens together")
    p.add_argument("--input", type=span, default=(100, 1024), metavar="LOW:HIGH", help="random prompt lengths, without --lengths")
    p.add_argument("--output", type=span, default=(100, 1024), metavar="LOW:HIGH", help="random output lengths, without --lengths")
    p.add_argument("--shared-prefix", type=int, default=0, help="tokens that all prompts begin with, added to their length")
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--ignore-eos", action="store_true")
    p.add_argument("--no-stream", dest="stream", action="store_false")
    p.add_argument("--repeat", type=int, default=1, help="runs of the same requests; the second finds its prompts cached")
    p.add_argument("--warmup", type=int, default=0, help="requests sent beforehand and not counted")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, help="write all figures, and each request's, to this file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if any request failed."""
    args = parser().parse_args(argv)
    if args.api == "chat":
        args.prompts = "text"
    requests = workload(args)
    if args.warmup:
        measure(args, [Request(0.0, request.body) for request in requests[: args.warmup]])
    results = []
    for run in range(args.repeat):
        records = measure(args, requests)
        results.append(summary(records) | {"records": [asdict(record) for record in records]})
        if args.repeat > 1:
            print(f"run {run + 1}")
        show(results[-1])
    if args.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "api_key"}
        args.json.write_text(json.dumps({"settings": settings, "runs": results}))
    return 1 if any(result["failed"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
