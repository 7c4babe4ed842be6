"""`prepare` of kernels/plan.cu, compiled for the CPU and run by the coroutines of host_block.h: the kernel's own source, without a card."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from gpu_worker.cuda.compiler import KERNELS
from gpu_worker.cuda.state import DeviceState
from gpu_worker.cuda.step_kernels import PREPARE
from gpu_worker.runner import Step
from protocol.columns import EMPTY, Int32
from protocol.messages import Geometry, Plan
from tests.gpu_worker.cuda.host_compiler import compiler

HERE = Path(__file__).parent
BLOCK_SIZE, SPREAD, LEFT = 16, 33, -7  # LEFT: what the list holds where nothing was written
_folder = tempfile.TemporaryDirectory(prefix="pagewire-prepare-")


@functools.cache
def _prepare(pack: int) -> ctypes._NamedFuncPointer:
    """The function of host_prepare.cpp. Skips the test where there is no C++ compiler."""
    library = Path(_folder.name) / f"pack{pack}.so"
    macros = [f"-DPACK={pack}"] if pack > 1 else []
    command = [compiler(), "-O1", "-w", "-shared", "-fPIC", "-std=c++17", *macros, f"-I{KERNELS}", "-o", str(library)]
    subprocess.run([*command, str(HERE / "host_prepare.cpp")], check=True, timeout=120)
    function = ctypes.CDLL(str(library)).host_prepare
    function.argtypes = [ctypes.c_int, ctypes.c_uint, *({"P": ctypes.c_void_p, "i": ctypes.c_int}[kind] for kind in PREPARE)]
    function.restype = ctypes.c_bool
    return function


def work_list(
    table: Int32,
    positions: list[int],
    pack: int,
    *,
    bucket: int = 0,
    max_len: int = 0,
    dead: tuple[int, ...] = (),
    seed: int = 0,
    threads: int = 0,
) -> Int32:
    """The items, shape [n, 8], that `prepare` makes for a decode step of slots in this order.

    table: [slots, width] blocks; positions: tokens cached; dead: slots that have ended; bucket: rows launched; threads: of the block,
    which are 1,024 on a card, but fewer do.
    """
    rows, width = table.shape
    bucket, max_len = bucket or rows, max_len or width * BLOCK_SIZE
    geometry = Geometry(
        block_size=BLOCK_SIZE, blocks=int(table.max()) + 1, host_blocks=0, slots=bucket, max_model_len=max_len, max_step_tokens=bucket,
        vocab_size=8,
    )  # fmt: skip
    state = DeviceState(geometry, torch.device("cpu"), SPREAD, 64, entries=1, results=1, pack=pack)
    state.table[:rows, :width] = torch.from_numpy(table)
    state.dead[list(dead)] = 1
    state.items.fill_(LEFT)
    ones, none = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    step = Step(
        Plan(step=1), [], np.arange(rows, dtype=np.int32), np.array(positions, np.int32), ones, ones, none, *[EMPTY] * 3, [], EMPTY, []
    )
    assert list(state.write(step, 0)) == [0]
    most = state.items_launched(bucket)
    ended = _prepare(pack)(threads or max(64, -(-bucket // 32) * 32), seed, *state.prepare_arguments(bucket, decode=True))
    assert ended, "threads wait for one another for ever"
    items: Int32 = state.items.numpy()
    assert (items[most:] == LEFT).all(), "more items than launched"
    used = int((items[:most, 0] >= 0).sum())
    assert (items[:used, 0] >= 0).all()
    assert (items[used:most, 0] == -1).all()
    assert (items[used:most, 3] == 1).all()
    return items[:used].copy()
