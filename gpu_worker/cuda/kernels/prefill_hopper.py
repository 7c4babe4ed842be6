"""Attention of prefill chunks on Hopper: what `prefill_attention.py` computes, with the tensor cores busy during the softmax.

A block stays and takes one tile of rows after another, 128 rows at a time, in three groups of warps (FlashAttention-3: Shah et al. 2024).
One fetches: the pages of K and V, as boxes of TMA, into a ring of tiles each, those of the next item while this one is computed. Two
compute, 64 rows each: while the weights of one tile are multiplied with its values, the softmax of the next tile is taken, and the
other group's products fill what is left. Gluon, the layer below Triton's language, is what can say that. Tiles of keys begin at
multiples of TILE, so that results do not depend on where a prompt is cut into chunks.
"""

# mypy: ignore-errors
# The bodies are Gluon's language, not Python's.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from gpu_worker.cuda.attention_kernels import BOX

ROWS = 128  # of a tile: tokens times query heads of a KV head
_ROWS, _BOX = gl.constexpr(ROWS), gl.constexpr(BOX)
# What Triton 3.6, since 3.7, and 3.9 call otherwise
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
_copy_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit(do_not_specialize=["number"])
def prefill_attention_hopper(
    cache,  # descriptor of one layer's [blocks * 2 * KV_HEADS * PAGE, D], the step's tokens in it, by boxes
    qkv,  # [tokens, (HEADS + 2 KV_HEADS) * D], 16 bits, q normalised and rotated
    table,  # [slots + 1, width] int32
    tiles,  # [number, 2] int32: row (−1: none), first token of the tile in the row; longest first
    rows,  # [rows, 8] int32: slot, first position, count, -, offset among the step's tokens, …
    out,  # [tokens, HEADS * D]
    scale,  # softmax's, times log2(e)
    number,
    WIDTH: gl.constexpr,  # of the table
    KV_HEADS: gl.constexpr,
    R: gl.constexpr,  # query heads of a KV head, a power of two
    D: gl.constexpr,  # 64 or 128
    PAGE: gl.constexpr,  # a multiple of 8
    TILE: gl.constexpr,
    STAGES: gl.constexpr,  # tiles in a ring, at least 2
    TURNS: gl.constexpr,
):
    SPAN: gl.constexpr = PAGE if PAGE < TILE else TILE
    BOXES: gl.constexpr = STAGES * (TILE // SPAN) * (D // _BOX)
    keys = gl.allocate_shared_memory(qkv.dtype.element_ty, [BOXES, SPAN, _BOX], _LAYOUT)
    values = gl.allocate_shared_memory(qkv.dtype.element_ty, [BOXES, SPAN, _BOX], _LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())  # of keys, then of values
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)  # both groups that compute
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    ring = (keys, values, full, empty)
    work = (tiles, rows, number)
    rounds = (number * KV_HEADS + gl.num_programs(0) - 1) // gl.num_programs(0)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_attend, (qkv, out, ring, turn, work, rounds, scale, FIRST, KV_HEADS, R, D, TILE, STAGES, TURNS)),
            (_attend, (qkv, out, ring, turn, work, rounds, scale, SECOND, KV_HEADS, R, D, TILE, STAGES, TURNS)),
            (_fetch, (cache, table, ring, work, rounds, WIDTH, KV_HEADS, R, PAGE, SPAN, D, TILE, STAGES)),
        ],
        [4, 1],
        [240, 24],  # registers of the second group and of the fetching warp; the first keeps what is left, as many as the second
    )


@gluon.jit
def _item(k, work, KV_HEADS: gl.constexpr):
    """Item k of this program, a tile of a KV head: the head, its first token in the row, and slot, first position, count and offset
    of the row; the count is 0 where there is none. Every other round goes backwards, so that programs get as much as one another."""
    tiles, rows, number = work
    p = gl.program_id(0)
    place = k * gl.num_programs(0) + p + k % 2 * (gl.num_programs(0) - 1 - 2 * p)
    tile = gl.minimum(place // KV_HEADS, number - 1)
    row = gl.load(tiles + 2 * tile)
    at = gl.load(tiles + 2 * tile + 1)
    there = (place < number * KV_HEADS) & (row >= 0)  # row −1: launched for nothing
    row = gl.maximum(row, 0) * 8
    at = gl.where(there, at, 0)  # so that no token of what is not there is below its count
    count = gl.where(there, gl.load(rows + row + 2), 0)
    return place % KV_HEADS, at, gl.load(rows + row), gl.load(rows + row + 1), count, gl.load(rows + row + 4)


@gluon.jit
def _key_tiles(at, first, count, R: gl.constexpr, TILE: gl.constexpr):
    """Tiles of keys that an item needs."""
    return gl.where(count > 0, (first + gl.minimum(at + _ROWS // R, count) + TILE - 1) // TILE, 0)


@gluon.jit
def _page_ids(slot_table, start, last, PAGE: gl.constexpr, SPAN: gl.constexpr, SPANS: gl.constexpr):
    """Pages of a tile's boxes; the last one's for what lies behind it."""
    ids = (gl.load(slot_table + gl.minimum(start // PAGE, last)),)
    for i in gl.static_range(1, SPANS):
        ids = ids + (gl.load(slot_table + gl.minimum((start + i * SPAN) // PAGE, last)),)  # noqa: RUF005  # Gluon unpacks no tuples
    return ids


@gluon.jit
def _fetch_tile(
    cache, ids, start, plane, to, first_box, full,
    KV_HEADS: gl.constexpr, PAGE: gl.constexpr, SPAN: gl.constexpr, SPANS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Ask for a tile of keys or values; plane: KV head, plus KV_HEADS for values. A tile in shared memory is its boxes, those of 64
    columns after another: as one matrix of the same layout would lie."""
    mbarrier.expect(full, SPANS * SPAN * D * 2)
    for i in gl.static_range(SPANS):
        line = (ids[i] * (2 * KV_HEADS) + plane) * PAGE + (start + i * SPAN) % PAGE
        for part in gl.static_range(D // _BOX):
            _copy_box(cache, [line, part * _BOX], full, to.index(first_box + part * SPANS + i))


@gluon.jit
def _fetch(
    cache, table, ring, work, rounds,
    WIDTH: gl.constexpr, KV_HEADS: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, SPAN: gl.constexpr,
    D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that keeps the rings full."""
    keys, values, full, empty = ring
    SPANS: gl.constexpr = TILE // SPAN
    i = 0  # tiles fetched so far
    for k in range(rounds):
        h, at, slot, first, count, _ = _item(k, work, KV_HEADS)
        slot_table = table + slot * WIDTH
        last = gl.maximum(first + count - 1, 0) // PAGE
        next_ids = _page_ids(slot_table, 0, last, PAGE, SPAN, SPANS)
        for j in range(_key_tiles(at, first, count, R, TILE)):
            ids = next_ids
            next_ids = _page_ids(slot_table, (j + 1) * TILE, last, PAGE, SPAN, SPANS)  # long before it is needed
            to = i % STAGES
            box = to * SPANS * (D // _BOX)
            phase = (i // STAGES + 1) & 1
            mbarrier.wait(empty.index(to), phase)
            _fetch_tile(cache, ids, j * TILE, h, keys, box, full.index(to), KV_HEADS, PAGE, SPAN, SPANS, D)
            mbarrier.wait(empty.index(STAGES + to), phase)
            _fetch_tile(cache, ids, j * TILE, KV_HEADS + h, values, box, full.index(STAGES + to), KV_HEADS, PAGE, SPAN, SPANS, D)
            i += 1


@gluon.jit
def _soften(score, m, total, scale):
    """Weights of a tile's scores [64, TILE] before the division, what earlier sums shrink by, and the new maximum and sum, [64] each."""
    top = gl.maximum(m, gl.max(score, 1) * scale)
    shrink = gl.exp2(m - top)
    p = gl.exp2(score * scale - top[:, None])  # one multiply-add
    return p, shrink, top, total * shrink + gl.sum(p, 1)


@gluon.jit
def _seen(score, j, position):
    """Scores of tile j, −∞ where the key stands behind its query."""
    key = j * score.shape[1] + gl.arange(0, score.shape[1], gl.SliceLayout(0, score.type.layout))
    return gl.where(key[None, :] <= position[:, None], score, float("-inf"))


@gluon.jit
def _queries(qkv, item, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, R: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    """A group's rows of an item's queries."""
    h, at, _, _, count, offset = item
    i = 64 * GROUP + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    token = at + i // R
    line = (offset + token).to(gl.int64) * ((R + 2) * KV_HEADS * D) + (h * R + i % R) * D
    return gl.load(qkv + line[:, None] + gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :], mask=(token < count)[:, None], other=0.0)


@gluon.jit
def _advance(
    q, p, m, total, acc, k, v, full, empty, turn, a, i, j, number, position, scale,
    MASKED: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Tile j's weights into `p` and those that were there, of the tile before, into `acc`; tile j's keys are there already.

    a, i: advances and tiles before this one, of all items. The wait for the next keys stands where it does so that the softmax is not
    moved behind the wait for `acc`.
    """
    at = i % STAGES
    before = (i + (STAGES - 1)) % STAGES
    zero = gl.full([64, k.shape[1]], 0.0, gl.float32, q.type.layout.parent)
    mbarrier.wait(full.index(STAGES + before), ((i - 1) // STAGES) & 1)
    if TURNS:
        mbarrier.wait(turn.index(GROUP), (a & 1) ^ (1 - GROUP))
    score = warpgroup_mma(q, k.index(at).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v.index(before), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turn.index(1 - GROUP), count=1)
    score = warpgroup_mma_wait(1, deps=[score])
    mbarrier.arrive(empty.index(at), count=1)
    if MASKED:
        score = _seen(score, j, position)
    weights, shrink, m, total = _soften(score, m, total, scale)
    weights = gl.convert_layout(weights.to(q.dtype), p.type.layout)
    mbarrier.wait(full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=j + 1 < number)
    acc, p, weights = warpgroup_mma_wait(0, deps=[acc, p, weights])
    mbarrier.arrive(empty.index(STAGES + before), count=1)
    return weights, m, total, acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _attend(
    qkv, out, ring, turn, work, rounds, scale,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, R: gl.constexpr, D: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Rows 64 GROUP … 64 GROUP + 63 of each item, by four warps."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    QUERY: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SCORE, k_width=2)
    WEIGHT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    keys, values, full, empty = ring
    k = _reinterpret(keys, keys.dtype, [STAGES, TILE, D], _LAYOUT)
    v = _reinterpret(values, values.dtype, [STAGES, TILE, D], _LAYOUT)
    i = 0  # tiles of keys so far
    following = _item(0, work, KV_HEADS)
    q = _queries(qkv, following, GROUP, KV_HEADS, R, D, QUERY)
    for number_of_item in range(rounds):
        h, at, _, first, count, offset = following
        following = _item(number_of_item + 1, work, KV_HEADS)
        number = _key_tiles(at, first, count, R, TILE)
        if number > 0:
            plain = (first + at) // TILE  # the tiles before it need no mask
            position = first + at + (64 * GROUP + gl.arange(0, 64, gl.SliceLayout(1, SCORE))) // R
            zero = gl.full([64, TILE], 0.0, gl.float32, SCORE)
            mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)
            score = warpgroup_mma(q, k.index(i % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            mbarrier.arrive(empty.index(i % STAGES), count=1)
            m = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, SCORE))
            total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, SCORE))
            p, _shrink, m, total = _soften(_seen(score, 0, position), m, total, scale)
            p = gl.convert_layout(p.to(q.dtype), WEIGHT)
            acc = gl.full([64, D], 0.0, gl.float32, SUM)
            mbarrier.wait(full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=number > 1)
            for j in range(1, plain):
                p, m, total, acc = _advance(
                    q, p, m, total, acc, k, v, full, empty, turn, i + j - number_of_item - 1, i + j, j, number, position, scale,
                    False, GROUP, STAGES, TURNS,
                )  # fmt: skip
            for j in range(gl.maximum(plain, 1), number):
                p, m, total, acc = _advance(
                    q, p, m, total, acc, k, v, full, empty, turn, i + j - number_of_item - 1, i + j, j, number, position, scale,
                    True, GROUP, STAGES, TURNS,
                )  # fmt: skip
            i += number
            last = (i - 1) % STAGES
            mbarrier.wait(full.index(STAGES + last), ((i - 1) // STAGES) & 1)
            if number * TILE > first + count:  # nobody wrote what lies behind the row's end: NaN may be there, and no weight hides it
                PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
                written = (number - 1) * TILE + gl.arange(0, TILE, gl.SliceLayout(1, PLAIN)) < first + count
                v.index(last).store(gl.where(written[:, None], v.index(last).load(PLAIN), 0.0))  # both groups write the same
                fence_async_shared()
                _barrier()
            acc = warpgroup_mma(p, v.index(last), acc, is_async=True)
            q = _queries(qkv, following, GROUP, KV_HEADS, R, D, QUERY)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(STAGES + last), count=1)
            acc = acc / gl.convert_layout(total, gl.SliceLayout(1, SUM))[:, None]
            rows_here = 64 * GROUP + gl.arange(0, 64, gl.SliceLayout(1, SUM))
            token = at + rows_here // R
            line = (offset + token).to(gl.int64) * (KV_HEADS * R * D) + (h * R + rows_here % R) * D
            to = out + line[:, None] + gl.arange(0, D, gl.SliceLayout(0, SUM))[None, :]
            gl.store(to, acc.to(out.dtype.element_ty), mask=(token < count)[:, None])
