"""A product whose batch rows are the tensor cores' M side: too few for what Hopper has."""

from __future__ import annotations

import triton
import triton.language as tl

from support.gpu.compiling import Entry


@triton.jit
def dense(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr):
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, 64):
        k = k0 + tl.arange(0, 64)
        x = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None], other=0.0)
        total = tl.dot(x, tl.load(b + n[None, :] * K + k[:, None]), total)
    tl.store(c + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None])


TYPES = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "M": "i32", "N": "i32", "K": "i32"}

ENTRIES = [
    Entry(dense, 90, TYPES, {"BM": rows, "BN": 64}, mma="HGMMA", aligned=frozenset(("N", "K")))
    for rows in (16, 64)
]
