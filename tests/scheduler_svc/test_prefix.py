"""Names of prefixes."""

from __future__ import annotations

import numpy as np

from scheduler_svc.prefix import Chain, Hasher

TOKENS = np.arange(35, dtype=np.int32)


def names(key: bytes = b"k" * 16, salt: bytes = b"", tokens: np.ndarray = TOKENS) -> list[bytes]:
    hasher = Hasher(key)
    chain = Chain(hasher, 4, tokens, hasher.root(salt))
    chain.extend(1000)
    return chain.names


def test_a_name_covers_everything_before_its_block() -> None:
    other = TOKENS.copy()
    other[2] = 99
    assert len(names()) == 8
    assert not set(names()) & set(names(tokens=other))
    other = TOKENS.copy()
    other[14] = 99
    assert [a == b for a, b in zip(names(), names(tokens=other), strict=True)] == [True] * 3 + [False] * 5


def test_key_and_salt_change_every_name() -> None:
    assert len({*names(), *names(salt=b"tenant"), *names(key=b"l" * 16)}) == 24


def test_a_chain_computed_in_slices_or_continued_is_the_same() -> None:
    hasher = Hasher(b"k" * 16)
    chain = Chain(hasher, 4, TOKENS, hasher.root(b""))
    assert [chain.extend(3), chain.extend(3)] == [3, 3]
    assert not chain.complete
    assert chain.extend(3) == 2
    assert chain.complete
    continued = Chain(hasher, 4, TOKENS, hasher.root(b""), names()[:5])
    assert continued.extend(1000) == 3
    assert chain.names == continued.names == names()
