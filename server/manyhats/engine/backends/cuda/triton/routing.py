"""Mixtures of experts: which row goes to which, what is of the same expert side by side, and the sum of what they give.

A row and one of its experts are a *pair*; pair ``row · TOP + i`` is the row and the i-th of its experts. Nothing about
how many pairs an expert has is known on the host.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def router(
    x, weight, parts, N, K, E, SPLIT, BM: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """``parts[split, row] = x[row] Wᵀ`` over one range of K, in float32 throughout.

    x [N, K] bfloat16; W [E, K] float32; parts [splits, N, E] float32. The ranges follow from K alone.

    Grid: (N / BM, E / BE, splits).
    """
    m, e, split = (
        tl.program_id(0) * BM + tl.arange(0, BM),
        tl.program_id(1) * BE + tl.arange(0, BE),
        tl.program_id(2),
    )
    total = tl.zeros((BM, BE), tl.float32)
    for k0 in range(split * SPLIT, tl.minimum(K, (split + 1) * SPLIT), BK):
        k = k0 + tl.arange(0, BK)
        X = tl.load(
            x + m.to(tl.int64)[:, None] * K + k[None, :], mask=(m < N)[:, None] & (k < K)[None, :], other=0.0
        )
        W = tl.load(weight + e[None, :] * K + k[:, None], mask=(e < E)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(X.to(tl.float32), W, total, input_precision="ieee")
    to = parts + (split.to(tl.int64) * N + m)[:, None] * E + e[None, :]
    tl.store(to, total, mask=(m < N)[:, None] & (e < E)[None, :])


@triton.jit
def ordered(v):
    """float32 as int32 in the same order, both zeros alike and NaN the largest."""
    bits = tl.where(v == 0.0, 0.0, v).to(tl.int32, bitcast=True)
    return tl.where(v != v, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit(do_not_specialize=["N"])
def route(
    parts, chosen, shares, N, E: tl.constexpr, BE: tl.constexpr, TOP: tl.constexpr, SPLITS: tl.constexpr,
    RENORMALIZES: tl.constexpr,
):  # fmt: skip
    """The TOP experts of a row with the largest logits, in order, and their shares: as ``forward.routed``.

    parts [SPLITS, N, E] float32 as ``router`` left them, whose sum are the logits; chosen [N, TOP] int32; shares
    [N, TOP] float32. Of equal logits the first is taken; whatever they are, TOP different experts are.

    Grid: (N,).
    """
    row, e = tl.program_id(0), tl.arange(0, BE)
    logits = tl.zeros((BE,), tl.float32)
    for split in tl.static_range(SPLITS):
        logits += tl.load(parts + (split * N + row).to(tl.int64) * E + e, mask=e < E, other=0.0)
    left = tl.where(e < E, ordered(logits).to(tl.int64) * BE + (BE - 1 - e), -(1 << 62))
    is_chosen = e < 0
    for _ in tl.static_range(TOP):
        is_best = left == tl.max(left)
        is_chosen = is_chosen | is_best
        left = tl.where(is_best, -(1 << 62), left)
    logits = tl.where(e < E, logits, float("-inf"))
    power = tl.exp(logits - tl.max(logits))
    share = power / tl.sum(power)
    if RENORMALIZES:
        share = share / tl.sum(tl.where(is_chosen, share, 0.0))
    to = row.to(tl.int64) * TOP + tl.cumsum(is_chosen.to(tl.int32)) - 1
    tl.store(chosen + to, e, mask=is_chosen)
    tl.store(shares + to, share, mask=is_chosen)


@triton.jit
def experts_of(chosen, rows, p, total, TOP: tl.constexpr, GATHERS: tl.constexpr):
    """The expert of each of some pairs, −1 from ``total`` on."""
    row = tl.load(rows + p // TOP, mask=p < total, other=0) if GATHERS else p // TOP
    return tl.load(chosen + row.to(tl.int64) * TOP + p % TOP, mask=p < total, other=-1)


@triton.jit(do_not_specialize=["N"])
def sort_pairs(
    chosen, rows, num_rows, pairs, tiles, num_tiles, N,
    E: tl.constexpr, BE: tl.constexpr, TOP: tl.constexpr, GATHERS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The pairs in the order of experts, those of one in their own order, and cut into tiles of one expert.

    chosen [N, TOP] int32; pairs [N · TOP] int32; tiles [tiles, 3] int32: expert, first place among the pairs, and how
    many, SIZE at most; num_tiles [1] int32. With ``GATHERS`` they are pairs of places: of rows [places] int32, of which
    there are num_rows [1].

    Grid: (E,), a program for each expert, which counts all pairs.
    """
    own, e = tl.program_id(0), tl.arange(0, BE)
    total = (tl.load(num_rows) if GATHERS else N) * TOP
    counts = tl.zeros((BE,), tl.int32)
    for p0 in range(0, total, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        expert = experts_of(chosen, rows, p, total, TOP, GATHERS)
        counts += tl.histogram(tl.maximum(expert, 0), BE, mask=p < total)
    first = tl.sum(tl.where(e < own, counts, 0))
    first_tile = tl.sum(tl.where(e < own, (counts + SIZE - 1) // SIZE, 0))
    count = tl.sum(tl.where(e == own, counts, 0))
    place = first
    for p0 in range(0, total, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        is_own = experts_of(chosen, rows, p, total, TOP, GATHERS) == own
        tl.store(pairs + place + tl.cumsum(is_own.to(tl.int32)) - 1, p, mask=is_own)
        place += tl.sum(is_own.to(tl.int32))
    own_tiles = (count + SIZE - 1) // SIZE
    for t0 in range(0, own_tiles, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        to, is_own = tiles + (first_tile + t) * 3, t < own_tiles
        tl.store(to, tl.zeros((BLOCK,), tl.int32) + own, mask=is_own)
        tl.store(to + 1, first + t * SIZE, mask=is_own)
        tl.store(to + 2, tl.minimum(count - t * SIZE, SIZE), mask=is_own)
    if own == E - 1:
        tl.store(num_tiles, first_tile + own_tiles)


@triton.jit
def combine(y, shares, out, D, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """``out[row] = Σ shares[row, i] · y[row · TOP + i]``, in the order of i, from zero.

    y [N · TOP, D] float32; shares [N, TOP] float32; out [N, D] float32.

    Grid: (N, D / BLOCK).
    """
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(TOP):
        share = tl.load(shares + row * TOP + i)
        total += tl.load(y + (row * TOP + i) * D + c, mask=c < D, other=0.0) * share
    tl.store(out + row * D + c, total, mask=c < D)
