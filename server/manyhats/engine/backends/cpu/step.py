"""The kernel that runs a program: a whole step in one call, on threads that are woken once."""

from __future__ import annotations

import functools
import time

import numpy as np
from llvmlite import ir
from numba import cfunc, prange, types
from numba.core.extending import intrinsic

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters.bottleneck import bottleneck, num_bottleneck_shares
from manyhats.engine.backends.cpu.adapters.deltas import (
    deltas,
    num_delta_shares,
    num_rescaled_shares,
    rescaled,
)
from manyhats.engine.backends.cpu.addresses import floats_at, halves_at, longs_at, signed_bytes_at
from manyhats.engine.backends.cpu.attention import attend
from manyhats.engine.backends.cpu.compile import inner, kernel
from manyhats.engine.backends.cpu.linear import linear
from manyhats.engine.backends.cpu.rowwise import norm_heads, rotate_and_store, rowwise
from manyhats.engine.backends.cpu.team import next_share, wait_for_all

_SHARES = 8
"""Per thread, at most: enough that no thread waits long for another, few enough that taking them costs nothing."""
_CLOCK = time.CLOCK_MONOTONIC
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


@inner
def panels_of_share(op, num_threads):
    """Panels of a linear's weights per share."""
    num_panels = (op[col.NUM_OUT] + op[col.PANEL_ROWS] - 1) // op[col.PANEL_ROWS]
    return max(1, num_panels // (_SHARES * num_threads))


@inner
def num_shares(op, frame, num_threads):
    """The shares of an instruction; 0 if it has nothing to do."""
    kind = op[col.INSTRUCTION]
    num_rows = frame[op[col.ROWS]]
    if kind == col.LINEAR:
        size = panels_of_share(op, num_threads) * op[col.PANEL_ROWS]
        return (op[col.NUM_OUT] + size - 1) // size if num_rows else 0
    if kind == col.ATTENTION:
        return frame[col.NUM_UNITS] * frame[col.NUM_KV_HEADS]
    if kind == col.DELTAS:
        return num_delta_shares(op, frame)
    if kind == col.RESCALED:
        return num_rescaled_shares(op, frame)
    if kind == col.BOTTLENECK:
        return num_bottleneck_shares(op, frame)
    # One thread finishes a row or two before another would notice them.
    return min(num_rows, _SHARES * num_threads) if num_rows > 2 else min(num_rows, 1)


@inner
def take_part(thread, frame_address, cached, packed):
    """One thread's part in a program; returns when all of the program is done.

    Args:
        thread: its number in this call.
        frame_address: of the frame, the call's columns included.
        cached: an array of the KV cache's dtype.
        packed: an array of the adapters' dtype.
    """
    frame = longs_at(frame_address)
    num_threads = frame[col.NUM_THREADS]
    buffers, scratch = longs_at(frame[col.BUFFERS]), floats_at(frame[col.SCRATCH])
    at = thread * frame[col.SCRATCH_SIZE]
    taken = longs_at(frame[col.COUNTERS])
    done = longs_at(frame[col.COUNTERS] + 8 * frame[col.NUM_INSTRUCTIONS])
    times = frame[col.TIMES] if thread == 0 else 0  # one thread's clock, since all wait for each other
    if times != 0:
        _clock_gettime(_CLOCK, times)
    for index in range(frame[col.NUM_INSTRUCTIONS]):
        op = longs_at(frame[col.INSTRUCTIONS] + 8 * col.NUM_COLUMNS * index)
        numbers = floats_at(frame[col.NUMBERS] + 8 * index)
        kind = op[col.INSTRUCTION]
        num_rows = frame[op[col.ROWS]]
        count = num_shares(op, frame, num_threads)
        num_mine = 0
        share = next_share(taken, index) if count else 0
        while share < count:
            first = num_rows * share // count
            last = num_rows * (share + 1) // count
            if kind == col.LINEAR:
                size = panels_of_share(op, num_threads) * op[col.PANEL_ROWS]
                linear(
                    op, num_rows, share * size, min((share + 1) * size, op[col.NUM_OUT]), buffers, scratch, at
                )
            elif kind == col.ATTENTION:
                attend(op, numbers, share, frame, buffers, cached, scratch, at)
            elif kind == col.DELTAS:
                deltas(op, share, frame, buffers, packed, scratch, at)
            elif kind == col.RESCALED:
                rescaled(op, share, frame, buffers, scratch, at)
            elif kind == col.BOTTLENECK:
                bottleneck(op, share, frame, buffers, packed, scratch, at)
            elif kind == col.ROTATE:
                rotate_and_store(op, first, last, frame, buffers, cached)
            elif kind == col.NORM_HEADS:
                norm_heads(op, numbers, first, last, buffers)
            else:
                rowwise(op, numbers, first, last, frame, buffers)
            num_mine += 1
            share = next_share(taken, index)
        wait_for_all(done, index, num_mine, count)
        if times != 0:
            times += 16
            _clock_gettime(_CLOCK, times)


def _floats_and_floats(thread, frame_address):
    take_part(thread, frame_address, floats_at(0), floats_at(0))


def _floats_and_halves(thread, frame_address):
    take_part(thread, frame_address, floats_at(0), halves_at(0))


def _halves_and_floats(thread, frame_address):
    take_part(thread, frame_address, halves_at(0), floats_at(0))


def _halves_and_halves(thread, frame_address):
    take_part(thread, frame_address, halves_at(0), halves_at(0))


def _bytes_and_floats(thread, frame_address):
    take_part(thread, frame_address, signed_bytes_at(0), floats_at(0))


def _bytes_and_halves(thread, frame_address):
    take_part(thread, frame_address, signed_bytes_at(0), halves_at(0))


_PARTS = {
    (4, 4): _floats_and_floats,
    (4, 2): _floats_and_halves,
    (2, 4): _halves_and_floats,
    (2, 2): _halves_and_halves,
    (1, 4): _bytes_and_floats,
    (1, 2): _bytes_and_halves,
}


@functools.cache
def part_for(cached_bytes, packed_bytes):
    """``take_part`` as a C function, compiled or loaded from disk.

    Args:
        cached_bytes: of a value in the KV cache: 4 for float32, 2 for bfloat16, 1 for int8.
        packed_bytes: likewise, in adapters; 4 or 2.
    """
    part = _PARTS[cached_bytes, packed_bytes]
    return cfunc(types.void(types.int64, types.int64), cache=True, nopython=True, error_model="numpy")(part)


@intrinsic
def _call(typingctx, address, thread, frame_address):
    """Calls the C function at an address."""

    def codegen(context, builder, signature, args):
        integer = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [integer, integer])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], args[2]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@kernel
def run(address, frame_address, num_threads):
    """Runs instructions one after another, each on all threads.

    Args:
        address: of each thread's part, from ``part_for``. It is called by address because Numba would compile it
            again, several times, as a part of this loop.
        frame_address: of [FRAME_SIZE] int64.
        num_threads: to use.
    """
    for thread in prange(num_threads):
        _call(address, np.int64(thread), frame_address)
