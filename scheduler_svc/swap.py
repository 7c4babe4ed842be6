"""A worker's host memory: blocks of swapped sequences on the way there, there, and on the way back.

A worker makes the copies of a plan before its rows, so a swap-out that stands in a plan comes after every row sent
before. Until the plan's result says that its copies are complete, nobody else may use the blocks at either end.

A host block whose copy is complete has its source's name. It keeps it when nobody needs the block any more, until the
block is taken for another: so a sequence whose worker's session ended, or any other with that prefix, finds it by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler_svc.blocks import BlockManager

if TYPE_CHECKING:
    from scheduler_svc.requests import Choice


@dataclass(slots=True, eq=False)
class Swap:
    """One sequence's blocks: `host[i]` has, or will have, what `blocks[i]` holds."""

    choice: Choice
    computed: int  # tokens whose K and V the blocks hold
    blocks: list[int]  # device blocks, referenced until they are copied
    host: list[int]
    earliest: int  # step whose copies may include these: all rows of the sequence are in plans before
    step: int = 0  # in whose plan the copies stand; 0: not sent yet
    copied: bool = False


@dataclass(slots=True)
class HostBlocks:
    """The host blocks of one worker, and the copies that are not complete. Swaps and copies to the device hold references."""

    count: int
    blocks: BlockManager  # of the device
    pool: BlockManager = field(init=False)  # of the host
    leaving: list[Swap] = field(default_factory=list)  # in the order of their steps
    returning: list[tuple[int, list[int]]] = field(default_factory=list)  # step, host blocks read by it

    def __post_init__(self) -> None:
        self.pool = BlockManager(self.count)

    @property
    def coming(self) -> int:
        """Device blocks that will be available once the copies under way are complete."""
        return sum(self.blocks.refs[block] == 1 for swap in self.leaving for block in swap.blocks)

    @property
    def busy(self) -> bool:
        """Whether copies wait for a plan to take them, or for one whose result says that they are complete."""
        return bool(self.leaving or self.returning)

    def swap_out(self, choice: Choice, computed: int, blocks: list[int], earliest: int) -> None:
        """Move the sequence to the host. The references on `blocks` are the swap's from here on."""
        choice.swap = Swap(choice, computed, blocks, self.pool.take(len(blocks)), earliest)
        self.leaving.append(choice.swap)

    def send(self, step: int) -> tuple[list[int], list[int]]:
        """Device and host blocks of the swaps that this step's plan takes along."""
        source: list[int] = []
        target: list[int] = []
        for swap in self.leaving:
            if not swap.step and swap.earliest <= step:
                swap.step = step
                source += swap.blocks
                target += swap.host
        return source, target

    def swap_in(self, choice: Choice, hits: int, step: int) -> list[int]:
        """The host blocks to copy back in this step's plan; those of the first `hits` blocks are not needed."""
        swap = choice.swap
        assert swap is not None
        assert swap.copied
        choice.swap = None
        self.returning.append((step, swap.host))
        return swap.host[hits:]

    def read(self, blocks: list[int], step: int) -> None:
        """This step's plan copies these blocks, which have been found by their names, to the device."""
        self.pool.share(blocks)
        self.returning.append((step, blocks))

    def void(self, choice: Choice) -> None:
        """The sequence will not come back this way."""
        swap, choice.swap = choice.swap, None
        if swap is None:
            return
        if swap.copied:
            self.pool.release(swap.host)
        elif not swap.step:
            self.leaving.remove(swap)
            self.blocks.release(swap.blocks)
            self.pool.release(swap.host)
        # else the acknowledgement will free both ends

    def acknowledged(self, step: int) -> None:
        """The copies of all plans up to this step are complete."""
        while self.leaving and 0 < self.leaving[0].step <= step:
            swap = self.leaving.pop(0)
            swap.copied = True
            named = [(host, name) for block, host in zip(swap.blocks, swap.host, strict=True) if (name := self.blocks.hash_of[block])]
            self.pool.publish([host for host, _ in named], [name for _, name in named])
            self.blocks.release(swap.blocks)
            if swap.choice.swap is not swap:
                self.pool.release(swap.host)
        while self.returning and self.returning[0][0] <= step:
            self.pool.release(self.returning.pop(0)[1])

    def withdraw(self, names: Sequence[bytes]) -> None:
        """Blocks with these names are not to be found any more."""
        for name in names:
            if (block := self.pool.by_hash.get(name)) is not None:
                self.pool.forget(block)

    def check(self, swapped: list[Swap]) -> None:
        """Verify the host's accounts; `swapped` are the swaps that choices still name. Raises AssertionError."""
        held = [block for swap in {id(s): s for s in [*swapped, *self.leaving]}.values() for block in swap.host]
        written = [block for swap in self.leaving for block in swap.host]
        assert all(self.pool.refs[block] == 1 and self.pool.hash_of[block] is None for block in written), "a host block has two writers"
        self.pool.check(held + [block for _, blocks in self.returning for block in blocks])
        assert all(swap.copied or swap in self.leaving for swap in swapped)
