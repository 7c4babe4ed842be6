"""The KV cache: keys and values of every token, kept in blocks, so that no sequence needs one contiguous piece of memory.

Block number 7 means block 7 of every layer. A sequence owns a *block table*: the numbers of its blocks, in the order of
its tokens. Token `p` of a sequence lies in block `table[p // block_size]` at offset `p % block_size`.
The idea is PagedAttention's (Kwon et al., "Efficient Memory Management for Large Language Model Serving", 2023).
"""

from __future__ import annotations

from collections import deque

import torch


class SimpleCache:
    """A pool of blocks, and who owns which."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_blocks: int = 256,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (layers, num_blocks, block_size, kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.tables: dict[str, list[int]] = {}
        self._free = deque(range(num_blocks))

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks that many tokens fill."""
        return -(-tokens // self.block_size)

    def grow(self, sequence: str, tokens: int) -> bool:
        """Give a sequence the blocks that its first `tokens` tokens need. False, and nothing is taken, if they are not there."""
        table = self.tables.get(sequence, [])
        missing = self.blocks_for(tokens) - len(table)
        if missing > len(self._free):
            return False
        self.tables[sequence] = table + [self._free.popleft() for _ in range(missing)]
        return True

    def free(self, sequence: str) -> None:
        """Take all blocks of a sequence back. What is in them need not be cleared: the next owner writes before it reads."""
        self._free.extend(self.tables.pop(sequence, []))

    def places(self, sequence: str, start: int, stop: int) -> torch.Tensor:
        """Where tokens start … stop − 1 of a sequence lie: int64 [stop − start], counted in tokens over the whole pool."""
        table = torch.tensor(self.tables[sequence])
        positions = torch.arange(start, stop)
        return table[positions // self.block_size] * self.block_size + positions % self.block_size

    def write(self, layer: int, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values, each [tokens, kv_heads, head_dim], at their places in one layer."""
        self.keys[layer].flatten(0, 1)[places] = keys
        self.values[layer].flatten(0, 1)[places] = values

    def read(self, layer: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values at these places in one layer, each [tokens, kv_heads, head_dim]."""
        return self.keys[layer].flatten(0, 1)[places], self.values[layer].flatten(0, 1)[places]
