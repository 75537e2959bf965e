"""Low-rank matrices in the kernel's order, against the order written out value by value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyhats.engine.backends.cpu.packing import LANES, as_array, pack_columns, pack_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 4, 6, 8, 17])
@pytest.mark.parametrize("size", [8, 24, 32, 72, 96])
def test_packed_matrices_have_every_value_at_its_place(dtype: torch.dtype, rank: int, size: int) -> None:
    values = as_array(
        torch.arange(rank * size).to(dtype)
    )  # large ones repeat in bfloat16, where they are compared
    a, b = values.reshape(rank, size), values.reshape(size, rank)
    packed_a, packed_b = np.empty_like(values), np.empty_like(values)
    pack_rows(a, packed_a)
    pack_columns(b, packed_b)
    fours, wide = rank - rank % 4, size - size % 32
    rows = [
        a[row + each, lane + offset]
        for row in range(0, fours, 4)
        for lane in range(0, size, LANES)
        for each in range(4)
        for offset in range(LANES)
    ]
    rows += [a[row, column] for row in range(fours, rank) for column in range(size)]
    blocks = [(begin, 32) for begin in range(0, wide, 32)] + [
        (begin, LANES) for begin in range(wide, size, LANES)
    ]
    columns = [
        b[begin + offset, row] for begin, width in blocks for row in range(rank) for offset in range(width)
    ]
    assert packed_a.tolist() == np.array(rows).tolist()
    assert packed_b.tolist() == np.array(columns).tolist()
