"""Adapters' low-rank deltas on experts.

A tile has pairs of one expert, in the order of the adapters: a program takes those of one adapter after another. A pair
here is one of a place, of the step's rows with an adapter.
"""

import triton
import triton.language as tl

from manyhats.engine.backends.cuda.record import EXPERT_MEMBERS, ExpertWord
from manyhats.engine.backends.cuda.triton.deltas import padded

A = tl.constexpr(int(ExpertWord.A))
B = tl.constexpr(int(ExpertWord.B))
RANK = tl.constexpr(int(ExpertWord.RANK))
SCALE = tl.constexpr(int(ExpertWord.SCALE))
WORDS = tl.constexpr(len(ExpertWord))
MEMBERS = tl.constexpr(len(EXPERT_MEMBERS))
NO_SLOT = tl.constexpr(1 << 30)

VARYING = ("at", "RECORD")
"""Integers that no value is compiled for on its own."""


@triton.jit
def tile_of(tiles, pairs, slots, t, TOP: tl.constexpr, BM: tl.constexpr):
    """A tile's expert, its pairs and their slots; ``NO_SLOT`` where there is no pair."""
    first, count, i = tl.load(tiles + t * 3 + 1), tl.load(tiles + t * 3 + 2), tl.arange(0, BM)
    pair = tl.load(pairs + first + i, mask=i < count, other=0)
    return tl.load(tiles + t * 3), pair, tl.load(slots + pair // TOP, mask=i < count, other=NO_SLOT)


@triton.jit
def table_of(records, slot, RECORD, at, expert, member):
    """The address of an adapter's table, and its entry of a linear of an expert; without a table both are 0."""
    table = tl.load(records + slot * RECORD + at)
    return table, (table + ((expert * MEMBERS + member) * WORDS) * 8).to(tl.pointer_type(tl.int64))


@triton.jit
def matrix_at(table, word):
    """A matrix, whose address counts from the table's."""
    return tl.multiple_of((table + tl.load(word)).to(tl.pointer_type(tl.bfloat16)), 16)


@triton.jit(do_not_specialize=VARYING)
def shrink_experts(
    x, t, pairs, tiles, num_tiles, rows, slots, records, RECORD, at, K, RANKS,
    MEMBER: tl.constexpr, PARTS: tl.constexpr, TOP: tl.constexpr, IS_OF_PAIRS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``t[pair, part] = x Aᵀ``, x of the pair's row or, with ``IS_OF_PAIRS``, of pair ``row · TOP + i`` itself.

    x [N, K] or [N · TOP, K] bfloat16; t [pairs, PARTS, RANKS] float32, whose whole tiles of ranks are written, with
    zeros beyond the rank; A [rank, K padded] bfloat16 of linear MEMBER + part.

    Grid: (tiles, PARTS, RANKS / BR).
    """
    tile, part, r = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BR + tl.arange(0, BR)
    if tile < tl.load(num_tiles):
        expert, pair, slot_of = tile_of(tiles, pairs, slots, tile, TOP, BM)
        row = tl.load(rows + pair // TOP).to(tl.int64)
        source = row * TOP + pair % TOP if IS_OF_PAIRS else row
        slot = tl.min(slot_of)
        while slot < NO_SLOT:
            is_mine = slot_of == slot
            table, entry = table_of(records, slot, RECORD, at, expert, MEMBER + part)
            if table != 0:
                rank = tl.load(entry + RANK).to(tl.int32)
                if tl.program_id(2) * BR < rank:
                    a, stride = matrix_at(table, entry + A), padded(K)
                    total = tl.zeros((BM, BR), tl.float32)
                    for k0 in range(0, K, BK):
                        k = k0 + tl.arange(0, BK)
                        X = tl.load(
                            x + source[:, None] * K + k[None, :],
                            mask=is_mine[:, None] & (k < K)[None, :],
                            other=0.0,
                        )
                        W = tl.load(
                            a + r[None, :] * stride + k[:, None],
                            mask=(r < rank)[None, :] & (k < K)[:, None],
                            other=0.0,
                        )
                        total = tl.dot(X, W, total)
                    to = (pair.to(tl.int64)[:, None] * PARTS + part) * RANKS + r[None, :]
                    tl.store(t + to, total, mask=is_mine[:, None])
            slot = tl.min(tl.where(slot_of > slot, slot_of, NO_SLOT))


@triton.jit(do_not_specialize=VARYING)
def expand_experts(
    t, y, pairs, tiles, num_tiles, rows, slots, records, RECORD, at, SIZE, RANKS,
    MEMBER: tl.constexpr, PARTS: tl.constexpr, TOP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """``y[row · TOP + i] += scale · t[pair, part] B`` in the SIZE columns of each part.

    t as ``shrink_experts`` left it, rounded to bfloat16; y [N · TOP, PARTS · SIZE] bfloat16 or float32; B [rank, SIZE
    padded] bfloat16.

    Grid: (tiles, PARTS, SIZE / BN).
    """
    tile, part, c = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BN + tl.arange(0, BN)
    if tile < tl.load(num_tiles):
        expert, pair, slot_of = tile_of(tiles, pairs, slots, tile, TOP, BM)
        row = tl.load(rows + pair // TOP).to(tl.int64)
        to = y + (row * TOP + pair % TOP)[:, None] * (PARTS * SIZE) + part * SIZE + c[None, :]
        slot = tl.min(slot_of)
        while slot < NO_SLOT:
            is_mine = (slot_of == slot)[:, None]
            table, entry = table_of(records, slot, RECORD, at, expert, MEMBER + part)
            if table != 0:
                rank = tl.load(entry + RANK).to(tl.int32)
                if rank > 0:
                    b, stride = matrix_at(table, entry + B), padded(SIZE)
                    total = tl.zeros((BM, BN), tl.float32)
                    for r0 in range(0, rank, BR):
                        r = r0 + tl.arange(0, BR)
                        inside = (pair.to(tl.int64)[:, None] * PARTS + part) * RANKS + r[None, :]
                        T = tl.load(t + inside, mask=is_mine, other=0.0)
                        W = tl.load(
                            b + r[:, None] * stride + c[None, :],
                            mask=(r < rank)[:, None] & (c < SIZE)[None, :],
                            other=0.0,
                        )
                        total = tl.dot(T.to(tl.bfloat16), W, total)
                    scale = tl.load((entry + SCALE).to(tl.pointer_type(tl.float32)))
                    mask = is_mine & (c < SIZE)[None, :]
                    changed = tl.load(to, mask=mask, other=0.0).to(tl.float32) + total * scale
                    tl.store(to, changed.to(y.dtype.element_ty), mask=mask)
            slot = tl.min(tl.where(slot_of > slot, slot_of, NO_SLOT))
