"""What is asked, and when: the same requests for the same arguments and seed, whatever server is measured."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

KINDS = ("random", "sharegpt", "shared-prefix", "multi-turn")
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part "
    "place case week company system program question work government number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father power hour"
)
WORDS = tuple(_WORDS.split())
# First turns of ShareGPT in tokens, cut as vLLM's bench cuts them: every 5th percentile of 2,000 prompts and answers, and
# how they correlate (of normal scores of the ranks): who asks much is answered shortly
SHAREGPT_PROMPTS = (4, 8, 10, 13, 16, 20, 26, 33, 49, 71, 112, 168, 237, 295, 341, 392, 453, 538, 654, 806, 1015)
SHAREGPT_OUTPUTS = (4, 8, 11, 14, 19, 25, 34, 48, 73, 102, 138, 181, 223, 258, 293, 335, 374, 427, 516, 653, 1888)
SHAREGPT_CORRELATION = -0.37


class WorkloadError(ValueError):
    """Arguments that make no workload; the text says which."""


@dataclass(frozen=True)
class Turn:
    """What a user says after an answer, and how many tokens may answer it."""

    text: str
    output: int


@dataclass(frozen=True)
class Request:
    """A request, or the first one of a conversation: when it is sent (seconds after the start), its body, what follows."""

    at: float
    body: bytes
    then: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Workload:
    """Lengths are in tokens (in words where prompts are text), spans are [low, high]."""

    kind: str = "random"
    requests: int = 100
    rate: float = 0.0  # requests/s; 0 or inf: all at once
    burstiness: float = 1.0  # 1: a Poisson process; below: bunched; above: evener; inf: exactly even
    seconds: float = 0.0  # only what arrives within so many seconds; 0: all
    api: str = "completions"  # completions, chat
    model: str = ""
    text: bool = False  # prompts of words rather than of token ids
    input: tuple[int, int] = (100, 1024)
    output: tuple[int, int] = (100, 1024)
    lengths: Sequence[tuple[int, int]] = ()  # (prompt, output) pairs to take instead
    max_total: int = 4000  # pairs of `lengths` with more tokens are left out
    prefix: int = 0  # that prompts begin with in common, on top of their own length
    prefixes: int = 1  # how many different ones there are
    turns: int = 4  # of a conversation
    vocab: int = 10_000  # token ids are drawn below this
    temperature: float = 0.0
    ignore_eos: bool = False
    stream: bool = True
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of every body


def read_lengths(path: Path) -> list[tuple[int, int]]:
    """(prompt, output) pairs of a JSON list. Raises WorkloadError."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, list) or not found:
            raise TypeError("it is none, or empty")
        pairs = [(int(prompt), int(output)) for prompt, output in found]
        if min(map(min, pairs)) < 1:
            raise ValueError("lengths are from 1 up")
        return pairs
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WorkloadError(f"{path} is no JSON list of [prompt, output] lengths: {error}") from error


def make(workload: Workload) -> list[Request]:
    """The requests, in the order of their arrival. Raises WorkloadError."""
    _check(workload)
    rng = random.Random(workload.seed)
    sizes = _sizes(workload, rng)
    prefixes = [_prompt(workload, workload.prefix, rng) for _ in range(max(1, workload.prefixes))] if workload.prefix else []
    requests = []
    prompts = [(_join(rng.choice(prefixes) if prefixes else None, _prompt(workload, size, rng)), output) for size, output in sizes]
    for at, (prompt, output) in zip(arrivals(workload, len(sizes), rng), prompts, strict=True):
        then: tuple[Turn, ...] = ()
        if workload.kind == "multi-turn":
            spans = ((rng.randint(*workload.input), rng.randint(*workload.output)) for _ in range(workload.turns - 1))
            then = tuple(Turn(_words(size, rng), wanted) for size, wanted in spans)
        if not workload.seconds or at < workload.seconds:
            requests.append(Request(at, json.dumps(_body(workload, prompt, output)).encode(), then))
    return requests


def follow(body: bytes, answer: str, turn: Turn) -> bytes:
    """The body of a conversation's next request: all that was said, and the next turn."""
    said = json.loads(body)
    if "messages" in said:
        said["messages"] += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn.text}]
    else:
        said["prompt"] += answer + "\n" + turn.text
    return json.dumps(said | {"max_tokens": turn.output}).encode()


def arrivals(workload: Workload, count: int, rng: random.Random) -> list[float]:
    """When each request is sent, in seconds after the start.

    Gaps are drawn from a gamma distribution of shape `burstiness` and mean 1 / rate, as vLLM's bench draws them.
    """
    rate, burstiness = workload.rate, workload.burstiness
    if not rate or rate == float("inf"):
        return [0.0] * count
    times, at = [], 0.0
    for _ in range(count):
        times.append(at)
        at += 1 / rate if burstiness == float("inf") else rng.gammavariate(burstiness, 1 / (rate * burstiness))
    return times


def _check(workload: Workload) -> None:
    if workload.kind not in KINDS:
        raise WorkloadError(f"workload: {workload.kind!r} is none of {', '.join(KINDS)}")
    for name in ("input", "output"):
        low, high = getattr(workload, name)
        if not 1 <= low <= high:
            raise WorkloadError(f"{name}: {low}:{high} is no span of lengths from 1 up")
    if workload.kind == "multi-turn" and not (workload.text or workload.api == "chat"):
        raise WorkloadError("prompts: multi-turn needs text, since an answer becomes part of the next prompt")
    if workload.kind == "shared-prefix" and not workload.prefix:
        raise WorkloadError("shared_prefix: its length is needed")
    if workload.rate < 0 or workload.burstiness <= 0:
        raise WorkloadError(f"rate and burstiness: {workload.rate} and {workload.burstiness} make no arrivals")


def _sizes(workload: Workload, rng: random.Random) -> list[tuple[int, int]]:
    if workload.lengths:
        pairs = [(p, o) for p, o in workload.lengths if p + o <= workload.max_total]
        if not pairs:
            raise WorkloadError(f"lengths: no pair has at most {workload.max_total} tokens")
        return [pairs[i % len(pairs)] for i in range(workload.requests)]
    if workload.kind == "sharegpt":
        return [_sharegpt(rng) for _ in range(workload.requests)]
    return [(rng.randint(*workload.input), rng.randint(*workload.output)) for _ in range(workload.requests)]


def _sharegpt(rng: random.Random) -> tuple[int, int]:
    """A pair with ShareGPT's two distributions and their correlation (a Gaussian copula)."""
    prompt = rng.gauss(0, 1)
    output = SHAREGPT_CORRELATION * prompt + math.sqrt(1 - SHAREGPT_CORRELATION**2) * rng.gauss(0, 1)
    return _quantile(SHAREGPT_PROMPTS, prompt), _quantile(SHAREGPT_OUTPUTS, output)


def _quantile(table: Sequence[int], score: float) -> int:
    """The length at a normal score, between the table's evenly spaced quantiles."""
    place = NormalDist().cdf(score) * (len(table) - 1)
    low = min(int(place), len(table) - 2)
    return round(table[low] + (table[low + 1] - table[low]) * (place - low))


def _prompt(workload: Workload, size: int, rng: random.Random) -> list[int] | str:
    if workload.text or workload.api == "chat":
        return _words(size, rng)
    return [rng.randrange(workload.vocab) for _ in range(size)]


def _words(size: int, rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(size))


def _join(prefix: list[int] | str | None, prompt: list[int] | str) -> list[int] | str:
    if isinstance(prefix, str) and isinstance(prompt, str):
        return f"{prefix} {prompt}"
    return prefix + prompt if isinstance(prefix, list) and isinstance(prompt, list) else prompt


def _body(workload: Workload, prompt: list[int] | str, output: int) -> dict[str, Any]:
    body: dict[str, Any] = {"max_tokens": output, "temperature": workload.temperature}
    body |= {"messages": [{"role": "user", "content": prompt}]} if workload.api == "chat" else {"prompt": prompt}
    if workload.model:
        body["model"] = workload.model
    if workload.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if workload.ignore_eos:
        body["ignore_eos"] = True
    return body | workload.extra
