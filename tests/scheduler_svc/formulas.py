"""What the fake worker computes: hashes of whole prefixes, and from them the tokens and log probabilities of a request."""

from __future__ import annotations

from hashlib import blake2b

VOCABULARY = 64
STOP = 63
TOKENIZER = b"t" * 16


def digest(*parts: object) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def prefix(before: int, token: int) -> int:
    return digest(before, token)


def sample(seed: int, position: int, before: int) -> int:
    return digest("draw", seed, position, before) % VOCABULARY


def likelihood(before: int) -> float:
    return -float(digest("likelihood", before) % 1024)


def expected_scores(prompt: list[int]) -> list[float]:
    """What is told of each prompt token but the first, computed without blocks."""
    state, told = 0, []
    for token in prompt:
        told.append(likelihood(state))
        state = prefix(state, token)
    return told[1:]


def expected(prompt: list[int], seed: int, max_tokens: int, stop: bool = True) -> list[int]:
    """The stream of a choice, computed without blocks."""
    state = 0
    for token in prompt:
        state = prefix(state, token)
    out: list[int] = []
    while len(out) < max_tokens:
        out.append(sample(seed, len(prompt) + len(out), state))
        if stop and out[-1] == STOP:
            break
        state = prefix(state, out[-1])
    return out
