"""The blocks of one worker: who uses them, which of them are worth keeping, and which goes next.

A block is in one of three states, and the three accounts always add up to all blocks:

    used    referenced by at least one block table or pending copy
    cached  referenced by nobody, content known by its hash: a later prompt may share it again
    free    referenced by nobody, content worthless

Blocks without references stand in one doubly linked list, the next to be taken at its head: worthless ones are put
at the head, cached ones at the tail, so that the list is in order of last use. The links are two lists of integers
indexed by block (intrusive: no node objects), so taking, sharing and releasing a block are O(1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockManager:
    """Reference counts, hashes and the free list of blocks 0 … count − 1."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.refs = [0] * count
        self.hash_of: list[bytes | None] = [None] * count
        self.by_hash: dict[bytes, int] = {}
        self.cached = 0
        self.used = 0
        self.taken = 0  # blocks given out to be written, ever
        # entry `count` is the list's sentinel: _after[count] is the head, _before[count] the tail
        self._after = [*range(1, count + 1), 0]
        self._before = [count, *range(count)]

    @property
    def available(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return self.count - self.used

    @property
    def free(self) -> int:
        """Blocks that nobody uses and whose content is worthless."""
        return self.count - self.used - self.cached

    def take(self, n: int) -> list[int]:
        """Give `n` blocks to one new owner, to be written; what they cached is forgotten.

        The caller has checked `available`. A block so taken has no entry in the index any more: no prompt that is
        looked up later can hit content that is about to be overwritten.
        """
        assert n <= self.available, "more blocks taken than there are"
        after, refs, hash_of = self._after, self.refs, self.hash_of
        end = self.count
        taken = []
        block = after[end]
        for _ in range(n):
            taken.append(block)
            refs[block] = 1
            name = hash_of[block]
            if name is not None:
                del self.by_hash[name]
                hash_of[block] = None
                self.cached -= 1
            block = after[block]
        after[end] = block
        self._before[block] = end
        self.used += n
        self.taken += n
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block."""
        for block in blocks:
            if not self.refs[block]:
                self._unlink(block)
                self.used += 1
                if self.hash_of[block] is not None:
                    self.cached -= 1
            self.refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give up a table's references. Its last block goes first: a prefix is of use only with all before it."""
        refs = self.refs
        for block in reversed(blocks):
            left = refs[block] - 1
            assert left >= 0, "a block was released more often than it was used"
            refs[block] = left
            if not left:
                self._link(block)

    def publish(self, blocks: Sequence[int], names: Sequence[bytes]) -> list[tuple[int, bytes]]:
        """Register those of the used blocks that have no hash and whose content no other block holds; returns them."""
        hash_of, enter = self.hash_of, self.by_hash.setdefault
        published = []
        for pair in zip(blocks, names, strict=True):
            block, name = pair
            if hash_of[block] is None and enter(name, block) == block:
                hash_of[block] = name
                published.append(pair)
        return published

    def adopt(self, block: int, name: bytes) -> bool:
        """Take over a block that the worker still holds from an earlier session, as cached."""
        if self.refs[block] or self.hash_of[block] is not None or name in self.by_hash:
            return False
        self._unlink(block)
        self.by_hash[name] = block
        self.hash_of[block] = name
        self.cached += 1
        self._insert(block, self._before[self.count])
        return True

    def forget(self, block: int) -> bool:
        """Withdraw a block's hash. False if it had none."""
        name = self.hash_of[block]
        if name is None:
            return False
        del self.by_hash[name]
        self.hash_of[block] = None
        if not self.refs[block]:
            self.cached -= 1
            self._unlink(block)
            self._insert(block, self.count)
        return True

    def match(self, names: Sequence[bytes], most: int) -> list[int]:
        """Find the blocks of the longest known prefix: the first of `names`, at most `most` of them."""
        found = []
        get = self.by_hash.get
        for name in names[:most]:
            block = get(name)
            if block is None:
                break
            found.append(block)
        return found

    def _link(self, block: int) -> None:
        self.used -= 1
        if self.hash_of[block] is None:
            self._insert(block, self.count)
        else:
            self.cached += 1
            self._insert(block, self._before[self.count])

    def _insert(self, block: int, behind: int) -> None:
        following = self._after[behind]
        self._after[behind] = block
        self._before[block] = behind
        self._after[block] = following
        self._before[following] = block

    def _unlink(self, block: int) -> None:
        before, after = self._before[block], self._after[block]
        self._after[before] = after
        self._before[after] = before

    def check(self, tables: Iterable[int]) -> None:
        """Verify every account against the tables' entries (one per reference). Raises AssertionError."""
        refs = [0] * self.count
        for block in tables:
            refs[block] += 1
        assert refs == self.refs, "reference counts do not match the tables"
        listed = []
        block = self._after[self.count]
        while block != self.count:
            assert self._before[self._after[block]] == block, "the free list is torn"
            listed.append(block)
            assert len(listed) <= self.count, "the free list runs in a circle"
            block = self._after[block]
        assert sorted(listed) == [b for b in range(self.count) if not refs[b]], "the free list is not the unused blocks"
        cached = sum(self.hash_of[b] is not None for b in listed)
        assert (cached, len(listed)) == (self.cached, self.count - self.used), "free + cached + used is not all blocks"
        assert self.by_hash == {name: b for b, name in enumerate(self.hash_of) if name is not None}, "the index is torn"
