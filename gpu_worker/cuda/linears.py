"""The linears of a step with few tokens: how `kernels/linear.cu` cuts a matrix, and its launch.

What no cut suits, and more tokens, go through cuBLAS (`forward.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpu_worker.cuda.driver import Kernel, Module

FEW = 16  # tokens up to which linear.cu is used
SHARED_LIMIT = 227 * 1024  # bytes of shared memory on an SM
LOADS = 16  # 16-byte loads of a lane in flight at most: 64 registers


@dataclass(frozen=True)
class Cut:
    """How linear.cu cuts an [n, k] matrix; in brackets its macros."""

    n: int
    k: int
    groups: int  # 16-row groups of a tile (J)
    warps: int  # over which a block splits K (W)
    split: int  # blocks of a cluster, over which K is split first (KS)
    clusters: int  # that walk over the tiles (CLUSTERS)
    per_sm: int  # blocks an SM must be able to hold (BLOCKS_PER_SM)

    @property
    def loads(self) -> int:
        """16-byte loads of a lane in flight."""
        return self.k // (32 * self.split * self.warps) * 2 * self.groups

    def shared_bytes(self, token_groups: int) -> int:
        """Dynamic shared memory of a block for 8 × token_groups tokens."""
        rows, tokens = 16 * self.groups, 8 * token_groups
        floats = 2 * self.warps * tokens * (rows + 4) + self.warps * tokens
        if self.split > 1:
            floats += 2 * rows * tokens
        single = self.n // rows <= self.clusters
        return 4 * floats + (0 if single else self.k // self.split * tokens * 2)


def cuts(n: int, k: int, needs_all_of_x: bool, sms: int) -> Iterator[Cut]:
    """All cuts of an [n, k] matrix that linear.cu can run. needs_all_of_x: a norm in the kernel, so no cluster."""
    for split in (1,) if needs_all_of_x else (1, 2, 4, 8):
        for warps in range(2, 17):
            for groups in (1, 2, 3):
                if n % (16 * groups) or k % (32 * split * warps) or 64 * groups % split:
                    continue
                per_sm = 2 if warps <= 8 else 1
                tiles = n // (16 * groups)
                most = max(1, min(tiles, sms * per_sm // split))
                rounds = -(-tiles // most)
                cut = Cut(n, k, groups, warps, split, -(-tiles // rounds), per_sm)
                if cut.loads <= LOADS and cut.shared_bytes(2) * per_sm <= SHARED_LIMIT:
                    yield cut


# Measured on an H100 (docs/performance.md): (n, k, needs_all_of_x) -> (groups, warps, split, clusters, blocks per SM)
MEASURED: dict[tuple[int, int, bool], tuple[int, int, int, int, int]] = {}


def best_cut(n: int, k: int, needs_all_of_x: bool, sms: int) -> Cut | None:
    """The measured cut of a known shape, else the one with most bytes in flight; None if linear.cu cannot take it."""
    known = MEASURED.get((n, k, needs_all_of_x))
    if known:
        return Cut(n, k, *known)

    def worth(cut: Cut) -> float:
        blocks = min(cut.clusters * cut.split, sms * cut.per_sm)
        return min(blocks * cut.warps * cut.loads, 32768) + 100 * cut.warps + 100 * cut.loads - 1000 * cut.split

    return max(cuts(n, k, needs_all_of_x, sms), key=worth, default=None)


class LinearKernel:
    """linear.cu compiled for one shape and one place in the layer, for at most 8 and at most 16 tokens."""

    def __init__(
        self, cut: Cut, arch: str, eps: float, *, norm: bool = False, silu: bool = False, residual: bool = False, bias: bool = False
    ) -> None:
        self.cut, self.eps = cut, eps
        flags = {"NORM": norm, "SILU": silu, "RESIDUAL": residual, "BIAS": bias}
        sizes = {"N": cut.n, "K": cut.k, "J": cut.groups, "W": cut.warps, "KS": cut.split}
        sizes |= {"CLUSTERS": cut.clusters, "BLOCKS_PER_SM": cut.per_sm} | {name: 1 for name, on in flags.items() if on}
        self._kernels = [
            Kernel(
                Module("linear.cu", arch, sizes | {"MT": groups}), "linear", "PPPPPif", 32 * cut.warps, cut.split, cut.shared_bytes(groups)
            )
            for groups in (1, 2)
        ]
        self._grid = (cut.clusters * cut.split, 1)

    def __call__(self, stream: int, weight: int, x: int, res: int, bias: int, y: int, tokens: int) -> None:
        """y[tokens, n] = x[tokens, k] weightᵀ (+ bias, + res); all arguments are device addresses, 0 where not used."""
        self._kernels[tokens > 8](stream, self._grid, weight, x, res, bias, y, tokens, self.eps)
