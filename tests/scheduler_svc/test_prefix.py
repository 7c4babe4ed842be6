"""Names of prefixes."""

from __future__ import annotations

import numpy as np

from scheduler_svc.prefix import RECENT, Chain, Hasher, Recent

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


def test_what_begins_like_another_takes_over_its_names() -> None:
    hasher = Hasher(b"k" * 16)
    recent, root = Recent(hasher), hasher.root(b"")
    first = recent.chain(4, TOKENS, root)
    assert first.extend(5) == 5  # the other three are named later
    other = TOKENS.copy()
    other[14] = 99
    like = recent.chain(4, other, root)
    assert like.names == names()[:3]
    first.extend(1000)
    longer = recent.chain(4, np.concatenate((other, other)), root)
    assert like.names == longer.names == names()[:3]  # the last one of this beginning counts
    longer.extend(1000)
    assert recent.chain(4, other, root).names == names(tokens=other)
    assert first.names == names()


def test_nothing_is_taken_over_across_a_salt_a_block_size_or_a_first_block() -> None:
    hasher = Hasher(b"k" * 16)
    recent = Recent(hasher)
    recent.chain(4, TOKENS, hasher.root(b"")).extend(1000)
    assert recent.chain(4, TOKENS, hasher.root(b"tenant")).names == []
    assert recent.chain(8, TOKENS, hasher.root(b"")).names == []
    assert recent.chain(4, TOKENS[1:], hasher.root(b"")).names == []
    assert recent.chain(4, TOKENS[:3], hasher.root(b"")).complete


def test_only_the_last_beginnings_are_kept() -> None:
    hasher = Hasher(b"k" * 16)
    recent, root = Recent(hasher), hasher.root(b"")
    for i in range(RECENT + 1):
        recent.chain(4, TOKENS + i, root).extend(1000)
    assert recent.chain(4, TOKENS, root).names == []
    assert recent.chain(4, TOKENS + RECENT, root).complete
