"""Mixed streams, always so many at once, of which every byte is compared with what the oracle must have said."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from frontend.detokenizer import TextStream
from frontend.sampling import seeds_of
from frontend.tokenizer import Tokenizer
from gpu_worker.byte_model import EOS
from gpu_worker.oracle import expected_with_logprobs
from protocol.tokenizer_files import byte_bundle

STREAMS = 48
KINDS = 8
TIMEOUT = 150.0  # seconds that a client waits for the next byte

TOKENIZER = Tokenizer.from_bundle(byte_bundle())


@dataclass
class Owed:
    """What one choice must be."""

    text: str
    reason: str
    logprobs: list[list[tuple[int, float]]]  # of each token, up to the one that ends the choice

    @property
    def tokens(self) -> int:
        return len(self.logprobs)


def owed_by(body: dict[str, Any]) -> list[Owed]:
    """The choices that an oracle stack owes for a completion with a string prompt and a seed."""
    prompt = TOKENIZER.encode_batch([body["prompt"]])[0]
    ends = [] if body.get("ignore_eos") else [EOS]
    owed = []
    for seed in seeds_of(body["seed"], body.get("n", 1)):
        text = TextStream(TOKENIZER, body.get("stop", []))
        choice = Owed("", "length", [])
        for token, pairs in expected_with_logprobs(
            prompt, seed, body["max_tokens"], ends, temperature=body.get("temperature", 1.0), logprobs=body.get("logprobs", 0)
        ):
            choice.logprobs.append(pairs)
            if token in ends:
                choice.reason = "stop"
                break
            choice.text += text.push(token)
            if text.stop is not None:
                break
        if text.stop is None:
            choice.text += text.flush()
        if text.stop is not None:
            choice.reason = "stop"
        owed.append(choice)
    return owed


def mixed_body(i: int, max_tokens: int) -> dict[str, Any]:
    """The i-th request: plain, greedy, stop strings, n = 2, a shared prefix, logprobs, without EOS, a long prompt."""
    body: dict[str, Any] = {"prompt": f"request {i} says " + "x" * (i * 7 % 60), "max_tokens": max_tokens - i % 7, "seed": i}
    match i % KINDS:
        case 1:
            body["temperature"] = 0
        case 2:
            whole = owed_by(body)[0].text
            at = len(whole) * 3 // 4
            # The first is seen half before it is seen whole; a part of another never becomes whole.
            body["stop"] = [whole[at : at + 4] or "qu", whole[at // 2 : at // 2 + 3] + "QQ"]
        case 3:
            body["n"] = 2
        case 4:
            body["prompt"] = "the same long beginning of several prompts, again and again: " + str(i)
        case 5:
            body["logprobs"] = 2
        case 6:
            body["ignore_eos"] = True
        case 7:
            body["prompt"] = f"{i} " + "a long prompt that takes several chunks " * 6
    return body


@dataclass
class Seen:
    """A streamed completion as its client saw it. Times are `time.monotonic()`."""

    body: dict[str, Any]
    frontend: str
    begun: float = field(default_factory=time.monotonic)
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    usage: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    done: int = 0
    times: list[float] = field(default_factory=list)  # of the chunks

    def read(self, url: str) -> None:
        """POST the body and read the stream to its end. Raises OSError or HTTPException if the connection breaks."""
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=TIMEOUT)
        try:
            full = {**self.body, "stream": True, "stream_options": {"include_usage": True}}
            connection.request("POST", "/v1/completions", json.dumps(full), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                self.error = json.loads(response.read())["error"]
                return
            for line in response:
                if line.startswith(b"data: "):
                    self._event(line[6:].strip())
        finally:
            connection.close()

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.done += 1
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]
            return
        if event.get("usage"):
            self.usage.append(event["usage"])
        for choice in event["choices"]:
            self.times.append(time.monotonic())
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            if choice["logprobs"]:
                self.logprobs.setdefault(index, []).append(choice["logprobs"])
            if choice["finish_reason"]:
                self.reasons.setdefault(index, []).append(choice["finish_reason"])

    def check(self) -> None:
        """Compare with what was owed. Raises AssertionError."""
        about = f"seed {self.body['seed']} at {self.frontend}"
        assert self.error is None, f"{about}: {self.error}"
        assert self.done == 1, f"{about}: [DONE] {self.done} times"
        owed = owed_by(self.body)
        for index, choice in enumerate(owed):
            assert self.texts.get(index, "") == choice.text, f"{about}, choice {index}"
            assert self.reasons.get(index) == [choice.reason], f"{about}, choice {index}: {self.reasons.get(index)}"
            if "logprobs" in self.body:
                self._check_logprobs(index, choice, about)
        assert len(self.usage) == 1, f"{about}: usage {len(self.usage)} times"
        assert self.usage[0]["prompt_tokens"] == len(self.body["prompt"].encode()), about
        assert self.usage[0]["completion_tokens"] == sum(choice.tokens for choice in owed), about

    def _check_logprobs(self, index: int, choice: Owed, about: str) -> None:
        seen = [value for part in self.logprobs[index] for value in part["token_logprobs"]]
        assert seen == [pairs[0][1] for pairs in choice.logprobs], f"{about}: logprobs"
        best = [alternatives for part in self.logprobs[index] for alternatives in part["top_logprobs"]]
        # of tokens that read the same, the token's own value or else the most probable one's counts: the first
        owed = [{TOKENIZER.token_bytes(id).decode(errors="replace"): value for id, value in reversed(pairs)} for pairs in choice.logprobs]
        assert best == owed, f"{about}: top_logprobs"

    def pause(self, after: float) -> float | None:
        """The longest time without a chunk that ended after a moment, in seconds; None if no chunk came before it and after."""
        gaps = [late - early for early, late in itertools.pairwise(self.times) if late > after]
        return max(gaps) if gaps and self.times[0] < after else None


class Load:
    """Keeps `streams` requests running, spread over frontends (name → URL), until `finish`.

    `bodies(i)` gives the i-th. With `rounds` each of the streams ends after so many requests.
    """

    def __init__(
        self,
        urls: dict[str, str],
        streams: int = STREAMS,
        max_tokens: int = 60,
        rounds: int = 0,
        first: int = 0,
        bodies: Callable[[int, int], dict[str, Any]] = mixed_body,
    ) -> None:
        self.seen: list[Seen] = []
        self._broken: list[tuple[Seen, BaseException]] = []
        self._bodies, self._max_tokens, self._rounds = bodies, max_tokens, rounds
        self._numbers = itertools.count(first)
        self._stop = threading.Event()
        self._beginning = threading.Lock()
        names = list(urls)
        self._threads = [threading.Thread(target=self._client, args=(names[i % len(names)], urls), daemon=True) for i in range(streams)]
        for thread in self._threads:
            thread.start()

    def _client(self, name: str, urls: dict[str, str]) -> None:
        left = self._rounds or -1
        while left:
            left -= 1
            seen = Seen(self._bodies(next(self._numbers), self._max_tokens), name)
            if not self._begins(seen):
                return
            try:
                seen.read(urls[name])
            except BaseException as error:
                self._broken.append((seen, error))
                return

    def _begins(self, seen: Seen) -> bool:
        """Whether a request may still begin; after `no_more` none does."""
        with self._beginning:
            if self._stop.is_set():
                return False
            seen.begun = time.monotonic()
            self.seen.append(seen)
            return True

    @property
    def streaming(self) -> int:
        """Streams that have begun and not ended."""
        return sum(bool(seen.times) and not seen.done for seen in self.seen)

    @property
    def chunks(self) -> int:
        """Chunks that have arrived."""
        return sum(len(seen.times) for seen in list(self.seen))

    def no_more(self) -> None:
        """Begin no new streams, and wait until those that have begun flow."""
        with self._beginning:
            self._stop.set()
        deadline = time.monotonic() + 60
        while waiting := [seen for seen in self.seen if not seen.times and seen.error is None]:
            assert time.monotonic() < deadline, f"{len(waiting)} streams do not flow; broken: {self._broken[:3]}"
            time.sleep(0.02)

    def well_underway(self) -> None:
        """Wait until most of the streams flow."""
        deadline = time.monotonic() + 60
        while self.streaming < len(self._threads) * 3 // 4:
            assert time.monotonic() < deadline, f"only {self.streaming} streams have begun; broken: {self._broken[:3]}"
            time.sleep(0.02)

    def wait(self, timeout: float = 120.0) -> None:
        """Let the running streams end; no new ones begin."""
        with self._beginning:
            self._stop.set()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = [seen for seen in self.seen if not seen.done and seen.error is None]
        assert not any(thread.is_alive() for thread in self._threads), f"{len(left)} streams have no end: {[s.body['seed'] for s in left]}"

    def finish(self, timeout: float = 120.0) -> None:
        """Let the running streams end, and compare every byte of all. Raises AssertionError."""
        self.wait(timeout)
        assert not self._broken, [(seen.body["seed"], seen.frontend, error) for seen, error in self._broken[:5]]
        for seen in self.seen:
            seen.check()

    def pauses(self, after: float, frontend: str = "") -> list[float]:
        """The pauses of all streams that were running at a moment, sorted, in seconds."""
        found = [seen.pause(after) for seen in self.seen if frontend in ("", seen.frontend)]
        return sorted(pause for pause in found if pause is not None)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of sorted values, by nearest rank."""
    return values[min(len(values) - 1, int(q * len(values)))]
