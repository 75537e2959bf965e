"""What the tests of CUDA's kernels stand on: bfloat16 in the interpreter, and the reading of compiled code."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from support.gpu.compiling import faults_of
from support.gpu.interpreter import DEVICE


@triton.jit
def cast(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def product(a, b, c, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_casts_to_bfloat16_round_to_the_nearest_even() -> None:
    x = torch.randn(4096, device=DEVICE)
    y = torch.empty(4096, dtype=torch.bfloat16, device=DEVICE)
    cast[(1,)](x, y, SIZE=4096)
    assert torch.equal(y, x.bfloat16())


def test_dots_of_bfloat16_are_those_of_its_values() -> None:
    a, b = (torch.randn(32, 32, device=DEVICE).bfloat16() for _ in range(2))
    c = torch.empty(32, 32, device=DEVICE)
    product[(1,)](a, b, c, SIZE=32)
    exact = a.double() @ b.double()
    assert (c.double() - exact).norm() <= 1e-6 * exact.norm()


def test_what_a_kernel_must_not_come_to_is_found() -> None:
    """Sixteen rows on the M side are too few for Hopper's instruction; 64 are enough."""
    assert faults_of("support.gpu.entries.faulty") == [
        "sm_90 dense BM=16 BN=64 stages=3: no HGMMA",
        "sm_90 dense BM=16 BN=64 stages=3: another tensor-core instruction",
    ]
