"""What holds for the CPU's linears, whatever their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import CpuLinear


def assert_rows_depend_on_themselves(
    kernels: Sequence[CpuKernels], packed: CpuLinear, x: Tensor, some: Sequence[int]
) -> None:
    """A row's bits are the same alone, among ``some`` rows, and on any number of threads."""
    whole = kernels[-1].linear(x, packed)
    for each in kernels:
        assert torch.equal(each.linear(x, packed), whole)
    for row in range(x.shape[0]):
        assert torch.equal(kernels[-1].linear(x[row : row + 1], packed)[0], whole[row])
    assert torch.equal(kernels[-1].linear(x[some], packed), whole[some])


def assert_rows_keep_what_is_not_finite(
    kernels: CpuKernels, packed: CpuLinear, x: Tensor, nan_row: int, inf_row: int
) -> None:
    """A NaN and an infinity in the input reach no other row."""
    expected = kernels.linear(x, packed)
    bad = x.clone()
    bad[nan_row, 5], bad[inf_row, 0] = torch.nan, torch.inf
    y = kernels.linear(bad, packed)
    others = [row for row in range(x.shape[0]) if row not in (nan_row, inf_row)]
    assert torch.equal(y[others], expected[others])
    assert y[nan_row].isnan().all()
    assert not y[inf_row].isfinite().any()
