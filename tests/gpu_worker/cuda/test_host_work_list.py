"""The work list of decode attention, as `prepare` (kernels/plan.cu) makes it, redone here: its bound and its cover."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.cuda.state import MAX_CHUNK, TILE, least_tiles, max_items, split_limit

SPREAD = 33


def spans(lengths: list[int], max_len: int, bucket: int) -> list[tuple[int, int, int]]:
    """(row, first, end) of each item; padding rows of the bucket have no cached token."""
    lengths = lengths + [0] * (bucket - len(lengths))
    tiles = [max(-(-n // TILE), 1) for n in lengths]
    total, limit = sum(tiles), split_limit(bucket, max_len, SPREAD)
    chunk = max(min(max(least_tiles(bucket), -(-total // SPREAD)), MAX_CHUNK), -(-total // limit))
    items = []
    for row, (n, t) in enumerate(zip(lengths, tiles, strict=True)):
        share = -(-t // -(-t // chunk))
        items += [(row, min(i * share * TILE, n), min((i + 1) * share * TILE, n)) for i in range(-(-t // share))]
    return items


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], int, int]:
    max_len = draw(st.sampled_from([64, 1000, 4096, 131072]))
    lengths = draw(st.lists(st.integers(0, max_len - 1) | st.just(max_len - 1), min_size=1, max_size=256))
    return lengths, max_len, len(lengths) + draw(st.integers(0, 15))


@given(batches())
def test_the_work_list_fits_its_bound_even_if_all_rows_are_of_full_length(batch: tuple[list[int], int, int]) -> None:
    lengths, max_len, bucket = batch
    assert len(spans(lengths, max_len, bucket)) <= max_items(bucket, max_len, SPREAD)
    assert len(spans([max_len - 1] * len(lengths), max_len, bucket)) <= max_items(bucket, max_len, SPREAD)


@given(batches())
def test_items_cover_every_cached_token_once_and_only_one_ends_a_row(batch: tuple[list[int], int, int]) -> None:
    lengths, max_len, bucket = batch
    items = spans(lengths, max_len, bucket)
    for row, n in enumerate(lengths):
        mine = [(first, end) for r, first, end in items if r == row]
        assert mine[0][0] == 0
        assert mine[-1][1] == n
        assert all(a[1] == b[0] for a, b in pairwise(mine))
        assert sum(end == n for _, end in mine) == 1
