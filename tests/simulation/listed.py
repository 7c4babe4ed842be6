"""What workers list in READY: wherever a name stands, on whichever worker, on device or host, there is one content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from gpu_worker.oracle_stream import UInt64
from protocol.columns import unpack
from tests.simulation.broken import STREAM, Broken
from tests.simulation.worker_node import WorkerNode

NAN = np.uint64(2**64 - 1)  # as the oracle stores it


def check_listed(workers: Iterable[WorkerNode]) -> None:
    """Compare the blocks that would be listed now. Raises Broken.

    Those with a NaN are left out: a row that has lost its owner takes no hash back, and whoever hits such a block does.
    """
    contents: dict[bytes, UInt64] = {}
    for worker in workers:
        for place, name, content in _listed(worker):
            if not (content == NAN).any() and not np.array_equal(contents.setdefault(name, content), content):
                raise Broken(STREAM, f"{worker.name} lists a block on the {place} under a name that another content has")


def _listed(worker: WorkerNode) -> Iterator[tuple[str, bytes, UInt64]]:
    ready, runner = worker.core.ready(), worker.runner
    for place, blocks, hashes, cache in (
        ("device", ready.blocks, ready.hashes, runner.cache),
        ("host", ready.host_blocks, ready.host_hashes, runner.host_cache),
    ):
        for i, block in enumerate(unpack(blocks).tolist()):
            yield place, hashes[16 * i : 16 * i + 16], cache[block]
