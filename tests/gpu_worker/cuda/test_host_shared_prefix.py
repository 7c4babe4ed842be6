"""Decode attention of rows that share a prefix against float64: the work list is what `prepare`'s own source makes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu_worker.cuda.host_prepare import work_list
from tests.gpu_worker.cuda.test_host_attention import Case, Scales, check_decode  # is skipped, and this file too, where Triton is not

SETTINGS = [  # head dimension, query heads per KV head, window, cap, units of keys and values in an fp8 cache
    (64, 1, 0, 0.0, None),
    (64, 2, 0, 0.0, None),
    (32, 4, 0, 0.0, None),
    (64, 8, 0, 0.0, None),
    (96, 3, 0, 0.0, None),
    (256, 2, 0, 0.0, None),
    (64, 2, 150, 0.0, None),
    (32, 4, 300, 20.0, None),
    (64, 1, 64, 0.0, None),
    (64, 2, 0, 20.0, None),
    (64, 4, 0, 0.0, (0.25, 3.0)),
    (96, 2, 200, 0.0, (1.0, 0.5)),
]
ROWS = [  # blocks shared with the row before, tokens cached: groups of 2 to 16, broken by others, ends anywhere in blocks and tiles
    *[(0, 333), *[(12, 200 + i) for i in range(15)]],
    *[(0, 70), (2, 40), (0, 0)],
    *[(0, 128), (8, 128), (8, 511)],
    *[(0, 300), (18, 289), (18, 300), (9, 150), (9, 145)],
]


def rows_of(rows: list[tuple[int, int]], setting: tuple[int, int, int, float, Scales]) -> Case:
    return Case([n for _, n in rows], *setting, common=[shared for shared, _ in rows[1:]])


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_rows_that_share_a_prefix(setting: tuple[int, int, int, float, Scales]) -> None:
    case, pack = rows_of(ROWS, setting), 16 // setting[1]
    items = work_list(case.table.cpu().numpy(), case.lengths, pack)
    of_groups = items[:, 3] == 0
    assert items[of_groups, 7].max() == pack
    check_decode(case, items, packed=1)
    # and where those that serve several rows come last, and so join the rows' results
    items[of_groups, 5] -= of_groups.sum()
    check_decode(rows_of(ROWS, setting), np.concatenate((items[~of_groups], items[of_groups])), packed=1)


@pytest.mark.slow
@pytest.mark.parametrize("count", range(2, 17))
def test_groups_of_every_size(count: int) -> None:
    case = rows_of([(0, 210), *[(9, 160 + 11 * i) for i in range(count - 1)]], (32, 1, 0, 0.0, None))
    items = work_list(case.table.cpu().numpy(), case.lengths, 16)
    assert set(items[items[:, 3] == 0, 7].tolist()) == {count}
    check_decode(case, items, packed=1)


@pytest.mark.slow
def test_the_kernel_that_may_pack_serves_rows_that_share_nothing() -> None:
    case = rows_of([(0, 90 * i) for i in range(5)], (64, 2, 0, 0.0, None))
    check_decode(case, work_list(case.table.cpu().numpy(), case.lengths, 8), packed=1)
