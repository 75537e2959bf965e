"""K6 and K6r: attention over keys and values in blocks, and the sums of its parts.

Scores are in units of log₂, so that weights are powers of two. Both kernels must be compiled without fused
multiply-adds: they add the splits of a context with the same operations, whichever of them does it.
"""

import triton
import triton.language as tl


@triton.jit
def _added(total, weight, largest, other_total, other_weight, other_largest):
    """Two softmaxes over different positions as one: ``Σ 2^(mᵢ − m) · tᵢ`` and ``Σ 2^(mᵢ − m) · wᵢ``, m = max mᵢ.

    Shapes: totals [M, K], weights and largest scores [M], float32. One that saw nothing has a largest score of −∞.
    """
    larger = tl.maximum(largest, other_largest)
    finite = tl.where(larger == float("-inf"), 0.0, larger)
    own, other = tl.exp2(largest - finite), tl.exp2(other_largest - finite)
    total = total * own[:, None] + other_total * other[:, None]
    return total, weight * own + other_weight * other, larger


@triton.jit(do_not_specialize=["TABLE_STRIDE"])
def attend(
    queries, keys, values, tables, items, count, part, stats, out, gates, query_start,
    SCALE, CAP, QUERY_STRIDE, TABLE_STRIDE,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    SEES_ALL: tl.constexpr, HAS_CAP: tl.constexpr, HAS_GATES: tl.constexpr,
):  # fmt: skip
    """``softmax(cap(scale · q Kᵀ)) V`` of one tile of query rows after another, over some splits of its context.

    A split is a softmax by itself, over ``SPLIT`` positions counted from 0, in tiles of ``TILE``; splits are added in
    order. So a row's sums are the same in decode, in prefill and in any chunk. Positions that a row does not see weigh
    exactly 0, and change no sum.

    Args:
        queries: [N, HQ, D] bfloat16, rows ``QUERY_STRIDE`` apart.
        keys, values: [blocks, BLOCK, HKV, D] bfloat16, of one layer.
        tables: [B, TABLE_STRIDE] int32, blocks of each sequence.
        items: [W, 8] int32: sequence, first row, number of rows, position of the first, length of the context, first
            split and the one after the last, and slot: −1 if these are all splits of the tile.
        count: [1] int32, how many items there are.
        part: [slots, HQ, D] float32, sums of values of items with a slot; row r of the tile has slot + r.
        stats: [slots, HQ, 2] float32, their largest score and sum of weights.
        out: [N, HQ, D] bfloat16 or float32, of items without a slot.
        gates: [B, 2] float32, factors of the keys and of the values before a sequence's own rows, if ``HAS_GATES``.
        query_start: [B + 1] int32, if ``HAS_GATES``.
        SCALE: of scores; ``scale · log₂ e``, or with a cap ``2 · scale · log₂ e / cap``.
        CAP: ``cap · log₂ e``.
        HEADS: query heads in a tile, which share a head of keys.
        BM: rows times heads in a tile.
        BD: D or more, a power of two.
        WINDOW: 0 for none.

    Grid: any number of programs, which walk the items, and HKV times the tiles that a group of heads needs.
    """
    GROUP: tl.constexpr = HQ // HKV
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // HEAD_TILES
    i, d = tl.arange(0, BM), tl.arange(0, BD)
    in_group = (tl.program_id(1) % HEAD_TILES) * HEADS + i % HEADS
    head = kv_head * GROUP + in_group
    for item in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        sequence, row0 = tl.load(items + item * 8), tl.load(items + item * 8 + 1)
        num_rows, position0 = tl.load(items + item * 8 + 2), tl.load(items + item * 8 + 3)
        length, first = tl.load(items + item * 8 + 4), tl.load(items + item * 8 + 5)
        end, slot = tl.load(items + item * 8 + 6), tl.load(items + item * 8 + 7)
        is_row = (i // HEADS < num_rows) & (in_group < GROUP)
        is_value = is_row[:, None] if BD == D else is_row[:, None] & (d < D)[None, :]
        at = (row0 + i // HEADS)[:, None] * QUERY_STRIDE + head[:, None] * D + d[None, :]
        Q = tl.load(queries + at, mask=is_value, other=0.0)
        position = position0 + i // HEADS
        low, high = 0, length
        if WINDOW > 0:
            low = tl.maximum(position0 - WINDOW + 1, 0) // TILE * TILE
        if SEES_ALL:
            if WINDOW > 0:
                high = tl.minimum(position0 + num_rows - 1 + WINDOW, length)
        else:
            high = position0 + num_rows
        if HAS_GATES:
            num_virtual = length - tl.load(query_start + sequence + 1) + tl.load(query_start + sequence)
            key_gate, value_gate = tl.load(gates + sequence * 2), tl.load(gates + sequence * 2 + 1)
        largest = tl.full((BM,), float("-inf"), tl.float32)
        weight = tl.zeros((BM,), tl.float32)
        total = tl.zeros((BM, BD), tl.float32)
        for split in range(first, end):
            split_largest = tl.full((BM,), float("-inf"), tl.float32)
            split_weight = tl.zeros((BM,), tl.float32)
            split_total = tl.zeros((BM, BD), tl.float32)
            for tile in range(tl.maximum(split * SPLIT, low), tl.minimum((split + 1) * SPLIT, high), TILE):
                p = tile + tl.arange(0, TILE)
                exists = p < length
                block = tl.load(tables + sequence * TABLE_STRIDE + p // BLOCK, mask=exists, other=0).to(
                    tl.int64
                )
                cell = ((block * BLOCK + p % BLOCK) * HKV + kv_head) * D
                where = cell[:, None] + d[None, :]
                is_there = exists[:, None] if BD == D else exists[:, None] & (d < D)[None, :]
                K = tl.load(keys + where, mask=is_there, other=0.0)
                V = tl.load(values + where, mask=is_there, other=0.0)
                S = tl.dot(Q, tl.trans(K))
                if HAS_GATES:
                    S = S * tl.where(p < num_virtual, key_gate, 1.0)[None, :]
                S = S * SCALE
                if HAS_CAP:  # cap · tanh(score / cap)
                    e = tl.exp2(-tl.abs(S))
                    tanh = (1 - e) / (1 + e)
                    S = CAP * tl.where(S < 0, -tanh, tanh)
                sees = exists[None, :]
                if not SEES_ALL:
                    sees = sees & (p[None, :] <= position[:, None])
                elif WINDOW > 0:
                    sees = sees & (p[None, :] - position[:, None] < WINDOW)
                if WINDOW > 0:
                    sees = sees & (position[:, None] - p[None, :] < WINDOW)
                S = tl.where(sees, S, float("-inf"))
                larger = tl.maximum(split_largest, tl.max(S, 1))
                finite = tl.where(larger == float("-inf"), 0.0, larger)
                P, shrink = tl.exp2(S - finite[:, None]), tl.exp2(split_largest - finite)
                split_weight = split_weight * shrink + tl.sum(P, 1)
                if HAS_GATES:
                    P = P * tl.where(p < num_virtual, value_gate, 1.0)[None, :]
                split_total = tl.dot(P.to(tl.bfloat16), V, split_total * shrink[:, None])
                split_largest = larger
            total, weight, largest = _added(total, weight, largest, split_total, split_weight, split_largest)
        if slot < 0:
            weight = tl.where(is_row, weight, 1.0)
            at = (row0 + i // HEADS)[:, None] * (HQ * D) + head[:, None] * D + d[None, :]
            tl.store(out + at, (total / weight[:, None]).to(out.dtype.element_ty), mask=is_value)
        else:
            to = (slot + i // HEADS).to(tl.int64) * HQ + head
            tl.store(part + to[:, None] * D + d[None, :], total, mask=is_value)
            tl.store(stats + to * 2, largest, mask=is_row)
            tl.store(stats + to * 2 + 1, weight, mask=is_row)


@triton.jit
def combine(
    part, stats, out, merges, count,
    HQ: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows whose splits are apart: these in order, ``Σ 2^(mₛ − m) · tₛ / Σ 2^(mₛ − m) · wₛ``.

    Args:
        part: [slots, HQ, D] float32, t.
        stats: [slots, HQ, 2] float32, m and w.
        out: [N, HQ, D] bfloat16 or float32.
        merges: [R, 4] int32: row, slot of its first split, from one split's slot to the next one's, and how many.
        count: [1] int32, how many rows these are.
        BD: D or more, a power of two.

    Grid: any number of programs, which walk the rows, and HQ.
    """
    head, d = tl.program_id(1), tl.arange(0, BD)[None, :]
    one = tl.arange(0, 1)
    for item in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        row, slot = tl.load(merges + item * 4), tl.load(merges + item * 4 + 1)
        step, num_splits = tl.load(merges + item * 4 + 2), tl.load(merges + item * 4 + 3)
        largest = tl.full((1,), float("-inf"), tl.float32)
        weight = tl.zeros((1,), tl.float32)
        total = tl.zeros((1, BD), tl.float32)
        for split in tl.range(0, num_splits, num_stages=4):
            at = (slot + split * step).to(tl.int64) * HQ + head
            split_total = tl.load(part + at * D + d, mask=d < D, other=0.0)
            split_largest, split_weight = tl.load(stats + at * 2 + one), tl.load(stats + at * 2 + 1 + one)
            total, weight, largest = _added(total, weight, largest, split_total, split_weight, split_largest)
        tl.store(
            out + (row * HQ + head) * D + d, (total / weight[:, None]).to(out.dtype.element_ty), mask=d < D
        )
