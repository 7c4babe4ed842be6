"""The linears of a step of up to 64 tokens: how `kernels/linear.cu` (up to 16) and `kernels/linear_mid.cu` cut a matrix, and their launch.

What no cut suits, and more tokens, go through cuBLAS (`forward.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpu_worker.cuda.driver import Kernel, Module

FEW, MID = 16, 64  # tokens up to which linear.cu and linear_mid.cu are used
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
    fp8: int = 0  # e4m3 weights, with a scale for each row (1) or for each 128 columns of it (128); 0: bf16 (FP8)

    @property
    def macros(self) -> dict[str, int]:
        """As linear.cu wants it."""
        sizes = {"N": self.n, "K": self.k, "J": self.groups, "W": self.warps, "KS": self.split}
        return sizes | {"CLUSTERS": self.clusters, "BLOCKS_PER_SM": self.per_sm} | ({"FP8": self.fp8} if self.fp8 else {})

    @property
    def loads(self) -> int:
        """16-byte loads of a lane in flight."""
        return self.k // (columns_of_chunk(self.fp8) * self.split * self.warps) * 2 * self.groups

    def shared_bytes(self, token_groups: int) -> int:
        """Dynamic shared memory of a block for 8 × token_groups tokens."""
        rows, tokens = 16 * self.groups, 8 * token_groups
        floats = 2 * self.warps * tokens * (rows + 4) + (self.warps + 1) * tokens
        if self.split > 1:
            floats += -(-self.n // rows // self.clusters) * rows * tokens
        single = self.n // rows <= self.clusters and not self.fp8
        return 4 * floats + (0 if single else self.k // self.split * tokens * 2)


def columns_of_chunk(fp8: int) -> int:
    """Columns of 64 bytes of a row."""
    return 64 if fp8 else 32


def cuts(n: int, k: int, needs_all_of_x: bool, sms: int, fp8: int = 0) -> Iterator[Cut]:
    """All cuts of an [n, k] matrix that linear.cu can run. needs_all_of_x: a norm in the kernel, so no cluster. fp8: as of `Cut`."""
    for split in (1,) if needs_all_of_x else (1, 2, 4, 8):
        for warps in range(2, 17):
            for groups in (1, 2, 3):
                if n % (16 * groups) or k % (columns_of_chunk(fp8) * split * warps) or 64 * groups % split:
                    continue
                per_sm = 2 if warps <= 8 else 1
                tiles = n // (16 * groups)
                most = max(1, min(tiles, sms * per_sm // split))
                rounds = -(-tiles // most)
                cut = Cut(n, k, groups, warps, split, -(-tiles // rounds), per_sm, fp8)
                if cut.loads <= LOADS and cut.shared_bytes(2) * per_sm <= SHARED_LIMIT:
                    yield cut


# Measured on an H100 (docs/performance.md): (n, k, needs_all_of_x) -> (groups, warps, split, clusters, blocks per SM)
MEASURED: dict[tuple[int, int, bool], tuple[int, int, int, int, int]] = {
    (4096, 1024, True): (2, 8, 1, 128, 2),
    (1024, 2048, False): (1, 16, 1, 64, 1),
    (6144, 1024, True): (1, 8, 1, 192, 2),
    (1024, 3072, False): (1, 16, 1, 64, 1),
    (151936, 1024, False): (1, 8, 1, 264, 2),
    (4096, 14336, False): (1, 8, 8, 16, 2),
}


def best_cut(n: int, k: int, needs_all_of_x: bool, sms: int, fp8: int = 0) -> Cut | None:
    """The measured cut of a known shape, else the one with most bytes in flight; None if linear.cu cannot take it."""
    known = None if fp8 else MEASURED.get((n, k, needs_all_of_x))
    if known:
        return Cut(n, k, *known)

    def worth(cut: Cut) -> float:
        blocks = min(cut.clusters * cut.split, sms * cut.per_sm)
        if fp8:  # e4m3 is worked on before it is multiplied, by many warps; a second group's sums take registers twice
            return min(blocks * cut.warps * cut.loads, 32768) + 200 * cut.warps + 50 * cut.loads - 1000 * cut.split - 500 * cut.groups
        return min(blocks * cut.warps * cut.loads, 32768) + 100 * cut.warps + 100 * cut.loads - 1000 * cut.split

    return max(cuts(n, k, needs_all_of_x, sms, fp8), key=worth, default=None)


@dataclass(frozen=True)
class MidCut:
    """How linear_mid.cu cuts an [n, k] matrix; in brackets its macros."""

    n: int
    k: int
    groups: int  # warpgroups over rows, 64 each (R)
    shares: int  # warpgroups over K (S)
    split: int  # blocks of a cluster, over which K is split first (KS)
    clusters: int  # that walk over the tiles (CLUSTERS)
    per_sm: int  # blocks an SM must be able to hold (BLOCKS_PER_SM)

    @property
    def macros(self) -> dict[str, int]:
        """As linear_mid.cu wants it."""
        sizes = {"N": self.n, "K": self.k, "R": self.groups, "S": self.shares, "KS": self.split}
        return sizes | {"CLUSTERS": self.clusters, "BLOCKS_PER_SM": self.per_sm}

    @property
    def loads(self) -> int:
        """16-byte loads of a lane in flight."""
        return self.k // (32 * self.split * self.shares) * 2

    def shared_bytes(self, token_groups: int) -> int:
        """Dynamic shared memory of a block for 8 × token_groups tokens."""
        tokens, rows = 8 * token_groups, 64 * self.groups
        own = rows // self.split
        stride = own if own % 16 == 8 else own + 8
        buffers = 1 if self.n // rows <= self.clusters else 2
        sharers = max(1, 4 * self.groups * self.shares // token_groups)
        inbox = self.split * self.shares * tokens * stride
        return self.k // self.split * tokens * 2 + 4 * (buffers * inbox + self.split * sharers * tokens)


def mid_cuts(n: int, k: int, sms: int) -> Iterator[MidCut]:
    """All cuts of an [n, k] matrix that linear_mid.cu can run."""
    for split in (1, 2, 4, 8):
        for groups in (1, 2, 3):
            for shares in (1, 2):
                if n % (64 * groups) or k % (32 * split * shares) or 8 * groups % split or groups * shares == 3:
                    continue
                for per_sm in (1, 2):
                    tiles = n // (64 * groups)
                    most = max(1, min(tiles, sms * per_sm // split))
                    cut = MidCut(n, k, groups, shares, split, -(-tiles // -(-tiles // most)), per_sm)
                    registers = 65536 // (128 * groups * shares * per_sm)
                    fits = cut.loads * 4 + 64 <= min(registers, 255) and cut.shared_bytes(8) * per_sm <= SHARED_LIMIT
                    if fits and cut.loads <= 2 * LOADS:
                        yield cut


# Measured on an H100 (docs/performance.md): (n, k) -> (groups, shares, split, clusters, blocks per SM)
MEASURED_MID: dict[tuple[int, int], tuple[int, int, int, int, int]] = {
    (4096, 1024): (2, 1, 4, 32, 2),
    (1024, 2048): (2, 1, 8, 8, 1),
    (6144, 1024): (2, 2, 2, 48, 1),
    (1024, 3072): (2, 1, 8, 8, 1),
}


def best_mid_cut(n: int, k: int) -> MidCut | None:
    """The measured cut of a known shape; None: cuBLAS is as good, or nobody has measured."""
    known = MEASURED_MID.get((n, k))
    return MidCut(n, k, *known) if known else None


class LinearKernel:
    """One linear of a layer at one place: linear.cu for at most 8 and 16 tokens, linear_mid.cu, of bf16 only, for at most 32 and 64."""

    def __init__(
        self,
        cut: Cut | None,
        mid: MidCut | None,
        arch: str,
        eps: float,
        *,
        norm: bool = False,
        silu: bool = False,
        residual: bool = False,
        bias: bool = False,
    ) -> None:
        """norm: x is scaled by 1 / rms(x) first; silu: rows alternate gate and up, y is half as wide; residual, bias: added."""
        self.eps = eps
        self.fp8 = bool(cut and cut.fp8)
        flags = {"NORM": norm, "SILU": silu, "RESIDUAL": residual, "BIAS": bias}
        macros = {name: 1 for name, on in flags.items() if on}
        self.kernels: list[tuple[int, Kernel, tuple[int, int]]] = []  # most tokens, kernel, grid
        if cut:
            for groups in (1, 2):
                self._add("linear", arch, cut.macros, macros, groups, 32 * cut.warps, cut)
        if mid:
            for groups in (4, 8):
                self._add("linear_mid", arch, mid.macros, macros, groups, 128 * mid.groups * mid.shares, mid)
        self.most = self.kernels[-1][0] if self.kernels else 0  # tokens it takes; more, or 0: cuBLAS

    def _add(self, name: str, arch: str, sizes: dict[str, int], flags: dict[str, int], groups: int, block: int, cut: Cut | MidCut) -> None:
        module = Module.of(f"{name}.cu", arch, flags | sizes | {"MT": groups})
        kernel = Kernel(module, name, "PPPPPif" + "PP" * self.fp8, block, cut.split, cut.shared_bytes(groups))
        self.kernels.append((8 * groups, kernel, (cut.clusters * cut.split, 1)))

    def __call__(self, stream: int, weight: int, x: int, res: int, bias: int, y: int, tokens: int, scales: int = 0, norm: int = 0) -> None:
        """y[tokens, n] = x[tokens, k] weightᵀ (+ bias, + res); all arguments are device addresses, 0 where not used.

        scales, norm: of e4m3 weights, theirs (fp32, [n] or [k / 128, n]) and the weight of the norm, if there is one, [k]."""
        kernel, grid = next((kernel, grid) for most, kernel, grid in self.kernels if tokens <= most)
        kernel(stream, grid, weight, x, res, bias, y, tokens, self.eps, *((scales, norm) if self.fp8 else ()))
