"""Rescaled and shifted rows: ``y = y · scale + offset`` on a linear's output, ``x = x · scale`` on its input."""

from __future__ import annotations

from numba import prange

from manyhats.engine.backends.cpu.compile import inner, kernel
from manyhats.engine.backends.cpu.simd import add, load, load_address, mul, store


@inner
def scale_span(y, at, size, address, like):
    """y[at : at + size] *= the float32 vector at ``address``."""
    for i in range(0, size, 8):
        store(y, at + i, mul(load(y, at + i), load_address(address + 4 * i, like)))


@inner
def shift_span(y, at, size, address, like):
    """y[at : at + size] += the float32 vector at ``address``."""
    for i in range(0, size, 8):
        store(y, at + i, add(load(y, at + i), load_address(address + 4 * i, like)))


@kernel
def affine(y, rows, row_slots, scale_address, offset_address, columns, sizes, like, num_threads):
    """y[i, columns] = y[i, columns] · scale + offset for each row i with an adapter, at each part of a linear.

    Args:
        y: [N, d_out of all parts] float32, updated.
        rows: [M] int32, the rows that have an adapter.
        row_slots: [M] int32, their slots.
        scale_address, offset_address: [S, parts] int64, of float32 vectors; 0 where there is none.
        columns, sizes: [parts] int32, where each part's outputs start in y, and their number.
        like: a float32 array.
    """
    width = y.shape[1]
    flat = y.reshape(-1)
    num_rows = rows.size
    for thread in prange(num_threads):
        for index in range(num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads):
            slot = row_slots[index]
            for part in range(columns.size):
                at = rows[index] * width + columns[part]
                if scale_address[slot, part] != 0:
                    scale_span(flat, at, sizes[part], scale_address[slot, part], like)
                if offset_address[slot, part] != 0:
                    shift_span(flat, at, sizes[part], offset_address[slot, part], like)
