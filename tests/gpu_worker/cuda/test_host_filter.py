"""kernels/filter.cu, run on the CPU by host_block.h, leaves of any logits what the CPU worker leaves of them, to the last token."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gpu_worker.cuda.compiler import KERNELS
from gpu_worker.runner import Record
from gpu_worker.sampler import Filters, Sampler
from protocol.columns import EMPTY
from protocol.messages import SamplingParams
from tests.gpu_worker.cuda.host_compiler import compiler

CPU = torch.device("cpu")
ROWS = 8
Array = npt.NDArray[np.float32]
_folder = tempfile.TemporaryDirectory(prefix="pagewire-filter-")


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    """The function of host_filter.cpp. Skips the test where there is no C++ compiler."""
    library = Path(_folder.name) / "filter.so"
    command = [compiler(), "-O1", "-w", "-shared", "-fPIC", "-std=c++17", f"-I{KERNELS}", "-o", str(library)]
    subprocess.run([*command, str(Path(__file__).parent / "host_filter.cpp")], check=True, timeout=120)
    function = ctypes.CDLL(str(library)).host_filter
    number, pointer = ctypes.c_int, ctypes.c_void_p
    function.argtypes = [number, number, number, pointer, number, *[pointer] * 5]
    function.restype = ctypes.c_bool
    return function


def kernel(logits: torch.Tensor, f: Filters, seed: int = 0, threads: int = 64) -> None:
    """As gpu_worker.cuda.filter.FilterKernel, by fewer threads than on a card; `seed` draws their order."""
    columns = (f.rows, f.temperature, f.log_min_p, f.every_k, f.every_p)
    pointers = [c.data_ptr() for c in columns]
    assert _function()(threads, seed, len(f.rows), logits.data_ptr(), logits.shape[1], *pointers), "threads wait for one another for ever"


def both(logits: Array, params: list[SamplingParams], seed: int = 0) -> tuple[Array, Array]:
    """What the kernel and the CPU's filter leave of the rows."""
    left = []
    slots = np.arange(len(params), dtype=np.int32)
    for filter in (lambda x, f: kernel(x, f, seed), None):
        sampler = Sampler(len(params), logits.shape[1], CPU, filter)
        for slot, p in enumerate(params):
            sampler.bind(slot, Record(slot, slots[:1], EMPTY, slot, p, 99))
        mine = torch.from_numpy(logits.copy())
        sampler.prepare(mine, slots, slots)
        left.append(mine.numpy())
    return left[0], left[1]


def drawn(seed: int, vocab: int, scale: float) -> tuple[Array, list[SamplingParams]]:
    """Logits, some of them equal, some −∞, and filters of all kinds."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(ROWS, vocab)) * scale).astype(np.float32)
    if seed % 3 == 0:
        logits = np.round(logits * 4) / 4
    if seed % 2:
        logits[:, rng.integers(0, vocab, vocab // 2)] = -np.inf
    params = [
        SamplingParams(
            9,
            temperature=float(rng.choice([0.1, 0.7, 1.0, 3.0])),
            top_k=int(rng.choice([0, 1, 5, 50, vocab - 1])),
            top_p=float(rng.choice([1.0, 0.05, 0.5, 0.9, 0.999])),
            min_p=float(rng.choice([0.0, 0.0, 0.1, 0.001])),
        )
        for _ in range(ROWS)
    ]
    return logits, params


@pytest.mark.parametrize("vocab", [8, 203, 3000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 30.0])
def test_the_kernel_leaves_what_the_cpu_leaves(vocab: int, scale: float) -> None:
    filtered = 0
    for seed in range(6):
        mine, cpu = both(*drawn(seed, vocab, scale), seed)
        np.testing.assert_array_equal(mine, cpu)
        filtered += int(np.isinf(mine).any(axis=1).sum())
    assert filtered


def test_top_p_finds_its_last_token_far_in_the_tail() -> None:
    logits = np.random.default_rng(1).normal(size=(2, 40_000)).astype(np.float32)
    params = [SamplingParams(9, temperature=5.0, top_p=0.99), SamplingParams(9, temperature=1.0, top_p=0.9999)]
    mine, cpu = both(logits, params)
    np.testing.assert_array_equal(mine, cpu)
    assert (np.isfinite(mine).sum(axis=1) > 20_000).all()


def test_values_far_below_the_best_are_told_apart() -> None:
    logits = np.array([[0.0, -100.0, -100.00001, -3e38, -3.1e38, -np.inf, -0.0, -1e-40]], np.float32)
    for k in range(1, 8):
        mine, cpu = both(logits, [SamplingParams(9, temperature=1.0, top_k=k)])
        np.testing.assert_array_equal(mine, cpu)


@pytest.mark.parametrize("temperature", [0.05, 3.0, 7.0])
def test_logits_that_the_temperature_makes_equal_stay_or_go_together(temperature: float) -> None:
    logits = np.full((1, 64), 1.5, np.float32).view(np.int32) - np.arange(64, dtype=np.int32)  # one beside the other
    for k in (1, 2, 3, 17, 40):
        for p in (1.0, 0.3):
            mine, cpu = both(logits.view(np.float32), [SamplingParams(9, temperature=temperature, top_k=k, top_p=p)])
            np.testing.assert_array_equal(mine, cpu)


def test_most_of_the_row_may_lie_far_below_the_best() -> None:
    logits = np.random.default_rng(2).normal(-200, 3, size=(1, 5000)).astype(np.float32)
    logits[0, :3] = 0.0, -1.0, -2.0
    for k in (2, 3, 4, 100, 4999):
        mine, cpu = both(logits, [SamplingParams(9, temperature=0.5, top_k=k, top_p=0.999)])
        np.testing.assert_array_equal(mine, cpu)
        mine, cpu = both(logits, [SamplingParams(9, temperature=0.5, top_k=k)])
        np.testing.assert_array_equal(mine, cpu)
        assert np.isfinite(mine).sum() == k


def test_a_row_with_a_nan_or_without_a_token_stays_as_it_is_and_others_are_filtered() -> None:
    logits = np.random.default_rng(1).normal(size=(3, 50)).astype(np.float32)
    logits[0, 7], logits[1] = np.nan, -np.inf
    mine, _ = both(logits, [SamplingParams(9, temperature=1.0, top_k=3, top_p=0.9)] * 3)
    np.testing.assert_array_equal(mine[:2], logits[:2])
    assert 1 <= np.isfinite(mine[2]).sum() <= 3


def test_the_order_of_threads_changes_nothing() -> None:
    logits, params = drawn(4, 600, 1.0)
    first, _ = both(logits, params, 1)
    for seed in range(2, 6):
        np.testing.assert_array_equal(both(logits, params, seed)[0], first)
