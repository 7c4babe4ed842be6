"""The stream that an oracle worker gives, as a function of prompt and seed: what tests compare every byte with.

    entry   e(t, p) = mix(t, p), a 64-bit hash of a token id and its position
    prefix  P(p) = P(p − 1) + e(t, p) mod 2⁶⁴, which is what the oracle's cache stores
    digest  D(p) = Σ W(i) P(i) for i ≤ p, W odd and pseudo-random: read along the block table in every step
    token   a function of mix(D(p), seed, p + 1) and the token before it: letters, spaces, some UTF-8 of two to four
            bytes, now and then EOS

Sums stand where a chain of hashes would, because numpy adds whole chunks at once. The array functions serve the
runner; `expected` does the same in Python's integers, so that each checks the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gpu_worker.byte_model import EOS, VOCAB
from protocol.columns import Int32

UInt64 = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.integer]
Pairs = list[tuple[int, float]]

_MASK = 2**64 - 1
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BY_POSITION, _BY_TOKEN, _BY_DRAW = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xA0761D6478BD642F
_U27, _U30, _U31, _UMIX_1, _UMIX_2 = (np.uint64(n) for n in (27, 30, 31, _MIX_1, _MIX_2))  # made once: each costs as much as its use
_COLUMNS = 256  # of the table of next tokens
_EOS_ONE_IN = 128
_RETRIES = 64


def _mix(x: UInt64) -> UInt64:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), element by element."""
    x = (x ^ (x >> _U30)) * _UMIX_1
    x = (x ^ (x >> _U27)) * _UMIX_2
    return x ^ (x >> _U31)


def _mix_one(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def entries(tokens: Ints, positions: Ints) -> UInt64:
    """e(t, p) of tokens (shape [n]) at positions (shape [n])."""
    return _mix(positions.astype(np.uint64) * np.uint64(_BY_POSITION) + tokens.astype(np.uint64) * np.uint64(_BY_TOKEN))


def weights(n: int) -> UInt64:
    """W(0) … W(n − 1)."""
    return _mix(np.arange(1, n + 1, dtype=np.uint64)) | np.uint64(1)


def draws(digests: UInt64, seeds: UInt64, positions: Ints) -> UInt64:
    """The hashes that decide the tokens at `positions`; all shapes [n]."""
    return _mix(_mix(digests ^ seeds) + positions.astype(np.uint64) * np.uint64(_BY_DRAW))


def _next_tokens() -> Int32:
    """Table [VOCAB, _COLUMNS]: what may follow a token. The bytes of a UTF-8 character follow its first one."""
    plain = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz    \xc3\xe2\xf0", np.uint8)
    column = np.arange(_COLUMNS, dtype=np.int32)
    table = np.tile(plain[column % len(plain)].astype(np.int32), (VOCAB, 1))
    table[0xC3] = 0xA0 + column % 23  # à … ö
    table[0xE2], table[0x82] = 0x82, 0xAC  # €
    table[0xF0], table[0x9F], table[0x98] = 0x9F, 0x98, 0xA0 + column % 24  # faces; no byte that would lead on
    return table


_NEXT = _next_tokens()
_NEXT_ROWS = _NEXT.tolist()
_UNFINISHED = (0xC3, 0xE2, 0x82, 0xF0, 0x9F, 0x98)  # a character goes on behind these bytes
_UNFINISHED_MASK = np.isin(np.arange(VOCAB), _UNFINISHED)


def pick(hashes: UInt64, last: Ints) -> Int32:
    """The tokens that draws mean behind the tokens `last`; all shapes [n]."""
    tokens = _NEXT[last, (hashes % np.uint64(_COLUMNS)).astype(np.int64)]
    ends = ((hashes >> np.uint64(32)) % np.uint64(_EOS_ONE_IN) == 0) & ~_UNFINISHED_MASK[last]
    return np.where(ends, np.int32(EOS), tokens)


def pick_one(draw: int, last: int, banned: Iterable[int] = ()) -> int:
    """The token that a draw means behind `last`; if it is banned, the first that further draws from it give."""
    forbidden = set(banned)
    for _ in range(_RETRIES):
        ends = (draw >> 32) % _EOS_ONE_IN == 0 and last not in _UNFINISHED
        token = EOS if ends else int(_NEXT_ROWS[last][draw % _COLUMNS])
        if token not in forbidden:
            return token
        draw = _mix_one((draw + _BY_DRAW) & _MASK)
    return next(token for token in range(VOCAB) if token not in forbidden)


def pairs(draw: int, token: int, alternatives: int) -> Pairs:
    """Logprobs of a sampled token: its own pair, then the alternatives, the most likely first; it is the first of them."""
    best = -((draw >> 40) % 1024) / 1024
    return [(token, best), *(((token + 7 * i) % VOCAB, best - i / 4) for i in range(alternatives))]


def _draw_one(state: int, position: int) -> int:
    """The hash that decides the token at a position; `state`: the digest before it, with the seed."""
    return _mix_one((_mix_one(state) + position * _BY_DRAW) & _MASK)


def _digests(history: Sequence[int], length: int) -> Iterator[int]:
    """D(p − 1) for each position p below `length`. The token at p is read afterwards: it may be appended meanwhile."""
    prefix = digest = 0
    for position, weight in enumerate(weights(length).tolist()):
        yield digest
        prefix = (prefix + _mix_one((position * _BY_POSITION + history[position] * _BY_TOKEN) & _MASK)) & _MASK
        digest = (digest + prefix * weight) & _MASK


def expected_prompt_logprobs(prompt: Sequence[int], alternatives: int) -> list[Pairs]:
    """The (id, logprob) pairs of each prompt token but the first, its own first."""
    digests = enumerate(_digests(prompt, len(prompt)))
    return [pairs(_draw_one(digest, position), prompt[position], alternatives) for position, digest in digests if position]


def seed_used(seed: int, temperature: float) -> int:
    """Greedy sampling (temperature 0) takes no seed into account."""
    return seed if temperature > 0 else 0


def expected_with_logprobs(
    prompt: Sequence[int],
    seed: int,
    max_tokens: int,
    stop_ids: Iterable[int] = (EOS,),
    min_tokens: int = 0,
    *,
    known: Sequence[int] = (),
    temperature: float = 1.0,
    logprobs: int = 0,
) -> list[tuple[int, Pairs]]:
    """Like `expected`, each token with its (id, logprob) pairs: its own first, then `logprobs` alternatives."""
    stops = set(stop_ids)
    seed = seed_used(seed, temperature)
    history = [*prompt, *known]
    length = len(prompt) + max_tokens
    made: list[tuple[int, Pairs]] = []
    for position, digest in enumerate(_digests(history, length)):
        if position >= len(history):
            draw = _draw_one(digest ^ seed, position)
            token = pick_one(draw, history[-1], stops if position - len(prompt) < min_tokens else ())
            history.append(token)
            made.append((token, pairs(draw, token, logprobs)))
            if token in stops:
                break
    return made


def expected(
    prompt: Sequence[int],
    seed: int,
    max_tokens: int,
    stop_ids: Iterable[int] = (EOS,),
    min_tokens: int = 0,
    *,
    known: Sequence[int] = (),
    temperature: float = 1.0,
) -> list[int]:
    """The tokens that a choice gets from any oracle worker, however it is scheduled, preempted and resumed.

    `max_tokens` and `min_tokens` count from the prompt; `known` are tokens sampled before, which are not returned.
    The token that ends the choice is part of the answer.
    """
    made = expected_with_logprobs(prompt, seed, max_tokens, stop_ids, min_tokens, known=known, temperature=temperature)
    return [token for token, _ in made]
