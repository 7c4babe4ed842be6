"""Names for prefixes: chained keyed hashes of full blocks.

The name of a block covers everything before it: hash(parent's name + the block's tokens), from a root that holds the
tenant's salt (the idea of vLLM's automatic prefix caching). The key is the deployment's: without it nobody can
compute a name from text, so a hit cannot be provoked from outside the salt's holders.
"""

from __future__ import annotations

import hashlib

import numpy as np

from protocol.columns import Int32

NAME_SIZE = 16  # bytes
RECENT = 32  # sequences whose names are kept for others that begin alike


class Hasher:
    """Names blocks under one key."""

    def __init__(self, key: bytes) -> None:
        # Key, parent and 16 tokens fit one 128-byte block of BLAKE2b, so a name costs one compression (0.4 µs with the
        # copy of the begun state; 0.5 in the keyed mode, which spends a block on the key). A prefixed key is as good
        # as the mode: BLAKE2 admits no length extension.
        self.keyed = hashlib.blake2b(key, digest_size=NAME_SIZE)
        self._roots = hashlib.blake2b(key, digest_size=NAME_SIZE, person=b"root")

    def root(self, salt: bytes) -> bytes:
        """The parent of a sequence's first block."""
        state = self._roots.copy()
        state.update(salt)
        return state.digest()

    def name(self, parent: bytes, tokens: bytes) -> bytes:
        """The name of a block with these packed tokens behind `parent`."""
        state = self.keyed.copy()
        state.update(parent + tokens)
        return state.digest()


class Chain:
    """The names of the full blocks of one token sequence, computed in slices as asked."""

    def __init__(self, hasher: Hasher, block_size: int, tokens: Int32, parent: bytes, names: list[bytes] | None = None) -> None:
        """`names` are those already known, `parent` the root if there are none."""
        self.names: list[bytes] = [] if names is None else names
        self.full = len(tokens) // block_size
        self._hasher = hasher
        self._width = 4 * block_size
        self._parent = self.names[-1] if self.names else parent
        self._packed = np.ascontiguousarray(tokens, dtype="<i4").tobytes() if self.full > len(self.names) else b""

    @property
    def complete(self) -> bool:
        """Whether every full block has its name."""
        return len(self.names) >= self.full

    def extend(self, most: int) -> int:
        """Name at most `most` further blocks; return how many were named."""
        first = len(self.names)
        last = min(self.full, first + most)
        copy, width, packed, parent, add = self._hasher.keyed.copy, self._width, self._packed, self._parent, self.names.append
        for offset in range(first * width, last * width, width):
            state = copy()  # Hasher.name, without the call
            state.update(parent + packed[offset : offset + width])
            parent = state.digest()
            add(parent)
        self._parent = parent
        if last == self.full:
            self._packed = b""
        return last - first


class Recent:
    """The sequences that were named last: what begins like one of them takes over the names of all that they share.

    To compare costs a hundredth of naming. Of those with the same first block the last one counts.
    """

    def __init__(self, hasher: Hasher) -> None:
        self._hasher = hasher
        self._kept: dict[bytes, tuple[Int32, Chain]] = {}  # root and first block -> tokens and names, oldest first

    def chain(self, block_size: int, tokens: Int32, root: bytes) -> Chain:
        """The chain of these tokens, with the names that are known already."""
        first = root + tokens[:block_size].tobytes()
        like = self._kept.pop(first, None)
        names = like[1].names[: _equal(tokens, like[0]) // block_size] if like is not None else []
        chain = Chain(self._hasher, block_size, tokens, root, names)
        if chain.full:
            self._kept[first] = tokens, chain
            if len(self._kept) > RECENT:
                del self._kept[next(iter(self._kept))]
        return chain


def _equal(one: Int32, other: Int32) -> int:
    """How many tokens both begin with."""
    n = min(len(one), len(other))
    differ = one[:n] != other[:n]
    return int(differ.argmax()) if differ.any() else n
