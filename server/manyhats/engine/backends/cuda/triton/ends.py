"""What adapters do at the two ends of a decoder: rows and deltas of the embedding, and rows of the output head."""

import triton
import triton.language as tl

from manyhats.engine.backends.cuda.record import EmbeddingWord, HeadWord
from manyhats.engine.backends.cuda.triton.deltas import (
    VARYING,
    integer,
    matrix,
    number,
    padded,
    segment,
    vector,
)

A = tl.constexpr(int(EmbeddingWord.A))
B = tl.constexpr(int(EmbeddingWord.B))
RANK = tl.constexpr(int(EmbeddingWord.RANK))
SCALE = tl.constexpr(int(EmbeddingWord.SCALE))
NUM_TOKENS = tl.constexpr(int(EmbeddingWord.NUM_TOKENS))
IDS = tl.constexpr(int(EmbeddingWord.IDS))
ROWS = tl.constexpr(int(EmbeddingWord.ROWS))
NUM_ROWS = tl.constexpr(int(EmbeddingWord.NUM_ROWS))

HEAD_ROWS = tl.constexpr(int(HeadWord.ROWS))
HEAD_IDS = tl.constexpr(int(HeadWord.IDS))
HEAD_BIAS = tl.constexpr(int(HeadWord.BIAS))
NUM_HEAD_ROWS = tl.constexpr(int(HeadWord.NUM_ROWS))


@triton.jit
def integers(word):
    """A word of a record as the address of int32 values."""
    return tl.multiple_of(tl.load(word).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def first_not_below(ids, size, wanted):
    """The first place of sorted ids [size] whose id is not below the wanted one; size if there is none."""
    low, high = 0, size
    while low < high:
        middle = (low + high) // 2
        if tl.load(ids + middle) < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=VARYING)
def change_embedding(
    token_ids, hidden, rows, slots, num_rows, records, RECORD, at, D, multiplier, BLOCK: tl.constexpr
):  # fmt: skip
    """``hidden[row] = E'[id] · multiplier``, E' being ``E[id] + scale · A[id] B``, or the adapter's own row of the id.

    token_ids [N] int32; hidden [N, D] float32 holds ``E[id] · multiplier``.

    Grid: (places, D / BLOCK).
    """
    place, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if place < tl.load(num_rows):
        entry = records + tl.load(slots + place) * RECORD + at
        row = tl.load(rows + place)
        token, to = tl.load(token_ids + row), hidden + row * D + c
        rank = integer(entry + RANK)
        if (rank > 0) & (token < integer(entry + NUM_TOKENS)):
            a, b = matrix(entry + A) + token.to(tl.int64) * padded(rank), matrix(entry + B)
            delta = tl.zeros((BLOCK,), tl.float32)
            for r in range(rank):
                W = tl.load(b + r * padded(D) + c, mask=c < D, other=0.0).to(tl.float32)
                delta += tl.load(a + r).to(tl.float32) * W
            changed = tl.load(to, mask=c < D, other=0.0) + delta * (number(entry + SCALE) * multiplier)
            tl.store(to, changed, mask=c < D)
        size = integer(entry + NUM_ROWS)
        if size > 0:
            ids = integers(entry + IDS)
            found = first_not_below(ids, size, token)
            if tl.load(ids + found, mask=found < size, other=-1) == token:
                own = matrix(entry + ROWS) + found * padded(D).to(tl.int64)
                changed = tl.load(own + c, mask=c < D, other=0.0).to(tl.float32) * multiplier
                tl.store(to, changed, mask=c < D)


@triton.jit(do_not_specialize=VARYING)
def own_logits(
    x, y, rows, segments, num_segments, records, RECORD, at, K, Y_STRIDE,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[row, ids[j]] = x[row] · w[j] + bias[j]``; where there are no ids, ids[j] is j.

    x [M, K] bfloat16; y [M, Y_STRIDE] float32; w [n, K padded] bfloat16; ids [n] int32, bias [n] float32.

    Grid: (segments, largest n / BN).
    """
    s, j = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    if s < tl.load(num_segments):
        slot, first, count = segment(segments, s)
        entry = records + slot * RECORD + at
        size = integer(entry + NUM_HEAD_ROWS)
        if tl.program_id(1) * BN < size:
            w, stride = matrix(entry + HEAD_ROWS), padded(K)
            i = tl.arange(0, BM)
            row = tl.load(rows + first + i, mask=i < count, other=0)
            at_w = w + j[None, :].to(tl.int64) * stride
            total = tl.zeros((BM, BN), tl.float32)
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)
                X = tl.load(
                    x + row[:, None] * K + k[None, :], mask=(i < count)[:, None] & (k < K)[None, :], other=0.0
                )
                W = tl.load(at_w + k[:, None], mask=(j < size)[None, :] & (k < K)[:, None], other=0.0)
                total = tl.dot(X, W, total)
            if tl.load(entry + HEAD_BIAS) != 0:
                total += tl.load(vector(entry + HEAD_BIAS) + j, mask=j < size, other=0.0)[None, :]
            column = j
            if tl.load(entry + HEAD_IDS) != 0:
                column = tl.load(integers(entry + HEAD_IDS) + j, mask=j < size, other=0)
            to = y + row[:, None].to(tl.int64) * Y_STRIDE + column[None, :]
            tl.store(to, total, mask=(i < count)[:, None] & (j < size)[None, :])
