"""The work list with and without groups of rows that share a prefix, made by the kernel's own source on the CPU (`host_prepare.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.state import max_partials
from protocol.columns import Int32
from tests.gpu_worker.cuda.host_prepare import BLOCK_SIZE, SPREAD, work_list
from tests.gpu_worker.cuda.test_host_work_list import batches, spans

PACKS = [2, 4, 5, 8, 16]
LEAST = 128  # tokens that neighbours must share


class Families:
    """Rows in the step's order, each with a prefix of some blocks in common with the row before it, and as many blocks as it needs."""

    def __init__(self, rows: list[tuple[int, int]], stale: bool = False) -> None:
        """rows: (blocks shared with the row before, tokens cached); stale: entries behind a row's blocks are those of the row before."""
        self.positions = [n for _, n in rows]
        width = max(self.positions) // BLOCK_SIZE + 1
        self.table = np.arange(len(rows) * width, dtype=np.int32).reshape(len(rows), width)
        for row, (shared, n) in enumerate(rows[1:], 1):
            self.table[row, :shared] = self.table[row - 1, :shared]
            if stale:
                self.table[row, n // BLOCK_SIZE + 1 :] = self.table[row - 1, n // BLOCK_SIZE + 1 :]

    def common(self, row: int) -> int:
        """Tokens that a row shares with the one before it, 0 if they are too few."""
        if row == 0:
            return 0
        blocks = min(self.positions[row - 1], self.positions[row]) // BLOCK_SIZE
        alike = self.table[row - 1, :blocks] == self.table[row, :blocks]
        tokens = BLOCK_SIZE * (blocks if alike.all() else int(alike.argmin()))
        return tokens if tokens >= LEAST else 0

    def groups(self, pack: int) -> Iterator[tuple[int, int, int]]:
        """(first row, rows, tokens in common) of those of two rows or more."""
        row, count = 0, len(self.positions)
        while row < count:
            end = row + 1
            while end < min(row + pack, count) and self.common(end):
                end += 1
            if end > row + 1:
                yield row, end - row, min(self.common(i) for i in range(row + 1, end))
            row = end


def check(families: Families, items: Int32, pack: int, max_len: int) -> None:
    """Every group is found; every row's cached tokens are covered once, in the order of its partials; an item of a group finds its rows."""
    count, groups = len(families.positions), items[items[:, 3] == 0]
    assert len(groups) == 0 or (items[: len(groups), 3] == 0).all()
    found = {(int(first), int(rows)): int(groups[groups[:, 0] == first, 2].max()) for first, _, _, _, _, _, _, rows in groups}
    assert sorted((first, rows, end) for (first, rows), end in found.items()) == list(families.groups(pack))
    parts: list[dict[int, tuple[int, int]]] = [{} for _ in range(count)]
    for row, first, end, splits, own, row_first, slot, position in items[len(groups) :].tolist():
        assert (slot, position) == (row, families.positions[row])
        assert splits > 0
        assert row_first <= own < row_first + splits
        assert own - row_first not in parts[row]
        parts[row][own - row_first] = (first, end)
    firsts = items[len(groups) : len(groups) + count]
    assert firsts[:, 0].tolist() == list(range(count))
    assert [row[4] - row[5] for row in firsts] == [min(p) for p in parts]
    for first, begin, end, _, index, at, slot, rows in groups.tolist():
        assert slot == first
        for row in range(first, first + rows):
            assert items[at + row - first, [0, 7]].tolist() == [row, families.positions[row]]
            assert index not in parts[row]
            parts[row][index] = (begin, end)
            blocks = -(-end // BLOCK_SIZE)
            assert (families.table[row, :blocks] == families.table[first, :blocks]).all()
    cells = set()
    for row, own in enumerate(parts):
        ordered = [own[i] for i in range(len(own))]
        assert ordered[0][0] == 0
        assert ordered[-1][1] == families.positions[row]
        assert all(a[1] == b[0] and a[0] < a[1] for a, b in pairwise(ordered))
        mine = range(firsts[row][5], firsts[row][5] + firsts[row][3])
        assert len(mine) == len(own)
        assert cells.isdisjoint(mine)
        cells |= set(mine)
    single = items[len(groups) :]
    assert np.bincount(single[single[:, 2] == single[:, 7], 0], minlength=count).tolist() == [1] * count
    assert cells == set(range(len(cells)))
    assert len(cells) <= max_partials(count, max_len, SPREAD, pack)


@st.composite
def families(draw: st.DrawFn) -> tuple[Families, int]:
    longest = draw(st.sampled_from([300, 1100, 4095]))
    shared = st.sampled_from([0, 7, 8, 9, 12, 20, longest // BLOCK_SIZE])
    n = st.integers(0, longest) | st.just(longest) | st.integers(8, longest // BLOCK_SIZE).map(lambda b: b * BLOCK_SIZE)
    rows = draw(st.lists(st.tuples(shared, n), min_size=1, max_size=70))
    if draw(st.booleans()):  # one prefix for all
        rows = [(draw(shared) or 8, n) for _, n in rows]
    return Families(rows, draw(st.booleans())), longest + 1


@pytest.mark.slow
@pytest.mark.parametrize("pack", PACKS)
@settings(deadline=None, max_examples=60)
@given(families(), st.integers(0, 1000))
def test_groups_are_found_and_every_token_is_covered_once(pack: int, some: tuple[Families, int], seed: int) -> None:
    given_rows, max_len = some
    check(given_rows, work_list(given_rows.table, given_rows.positions, pack, max_len=max_len, seed=seed), pack, max_len)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(batches())
def test_without_packing_the_list_is_that_of_single_rows(batch: tuple[list[int], int, int]) -> None:
    lengths, max_len, bucket = batch
    table = np.zeros((len(lengths), 1), np.int32)
    items = work_list(table, lengths, 1, bucket=bucket, max_len=max_len)
    assert [tuple(item) for item in items[:, :3].tolist()] == spans(lengths, max_len, bucket)
    assert items[:, 4].tolist() == list(range(len(items)))


@pytest.mark.slow
@pytest.mark.parametrize("pack", [4, 8])
def test_a_burst_over_one_prefix_reads_it_once_for_every_full_group(pack: int) -> None:
    burst = Families([(128, 2048 + 64 + i % 7) for i in range(250)])
    items = work_list(burst.table, burst.positions, pack, max_len=4096, threads=1024)
    check(burst, items, pack, 4096)
    read = int((items[:, 2] - items[:, 1]).sum())
    assert read == -(-250 // pack) * 2048 + sum(n - 2048 for n in burst.positions)
    alone = work_list(burst.table, burst.positions, 1, max_len=4096)
    assert int((alone[:, 2] - alone[:, 1]).sum()) == sum(burst.positions)


def test_a_row_that_shares_nothing_and_one_that_has_ended_break_a_run() -> None:
    rows = Families([(20, 400)] * 12)
    rows.table[4] += 100_000
    items = work_list(rows.table, rows.positions, 8, dead=(9,))
    groups = items[items[:, 3] == 0]
    assert sorted({(int(g[0]), int(g[7])) for g in groups}) == [(0, 4), (5, 4), (10, 2)]
    ended = items[(items[:, 0] == 9) & (items[:, 3] > 0)]
    assert ended[:, [1, 2, 3, 7]].tolist() == [[0, 0, 1, 0]]


def test_rows_that_a_graph_adds_are_no_one_s_group() -> None:
    rows = Families([(20, 400)] * 10)
    items = work_list(rows.table, rows.positions, 4, bucket=16)
    groups = items[items[:, 3] == 0]
    assert sorted({(int(g[0]), int(g[7])) for g in groups}) == [(0, 4), (4, 4), (8, 2)]
    assert items[items[:, 0] >= 10][:, [1, 2, 3]].tolist() == [[0, 0, 1]] * 6
