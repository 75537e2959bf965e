"""The kernel that runs a program: a whole step in one call, on threads that are woken once."""

from __future__ import annotations

import functools
import time

import numpy as np
from llvmlite import ir
from numba import cfunc, prange, types
from numba.core.extending import intrinsic

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters.bottleneck import (
    bottleneck,
    num_bottleneck_shares,
    num_unnormed_shares,
    unnormed,
)
from manyhats.engine.backends.cpu.adapters.deltas import (
    deltas,
    num_delta_shares,
    num_rescaled_shares,
    rescaled,
)
from manyhats.engine.backends.cpu.adapters.expert_deltas import expert_deltas, num_expert_delta_shares
from manyhats.engine.backends.cpu.adapters.gates import (
    gate_linears,
    gate_prefix,
    gate_sublayer,
    num_gate_shares,
)
from manyhats.engine.backends.cpu.addresses import floats_at, halves_at, longs_at, signed_bytes_at
from manyhats.engine.backends.cpu.attention.attend import attend
from manyhats.engine.backends.cpu.compile import inner, kernel
from manyhats.engine.backends.cpu.experts import (
    combine,
    expert_linear,
    num_expert_shares,
    pair,
    route,
    spread,
)
from manyhats.engine.backends.cpu.head.exact import exact_logits, refine, refine_allowed
from manyhats.engine.backends.cpu.linear import linear
from manyhats.engine.backends.cpu.packing import Array
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
    if kind == col.EXPERT_LINEAR:
        return num_expert_shares(op, _SHARES * num_threads)
    if kind == col.PAIR:
        return min(num_rows, 1)
    if kind == col.ATTENTION:
        return frame[col.NUM_UNITS] * frame[col.NUM_KV_HEADS]
    if kind == col.DELTAS:
        return num_delta_shares(op, frame)
    if kind == col.RESCALED:
        return num_rescaled_shares(op, frame)
    if kind == col.EXPERT_DELTAS:
        return num_expert_delta_shares(op, frame)
    if kind == col.BOTTLENECK:
        return num_bottleneck_shares(op, frame)
    if kind == col.UNNORMED:
        return num_unnormed_shares(op, frame)
    if kind in (col.GATE_LINEARS, col.GATE_SUBLAYER, col.GATE_PREFIX):
        return num_gate_shares(op, frame)
    # One thread finishes a row or two before another would notice them.
    return min(num_rows, _SHARES * num_threads) if num_rows > 2 else min(num_rows, 1)


@inner
def _instruction(frame, index):
    """An instruction's columns and its numbers."""
    op = longs_at(frame[col.INSTRUCTIONS] + 8 * col.NUM_COLUMNS * index)
    return op, floats_at(frame[col.NUMBERS] + 8 * index)


@inner
def _rows_of_share(num_rows, share, count):
    """The first row of a share, and one past its last."""
    return num_rows * share // count, num_rows * (share + 1) // count


@inner
def _column_of(instruction):
    """The frame's column with the address of what carries out its shares."""
    if instruction in (col.ROTATE, col.ATTENTION, col.GATE_PREFIX):
        return col.CACHE_SHARE
    of_adapters = (col.DELTAS, col.EXPERT_DELTAS, col.BOTTLENECK)
    return col.ADAPTER_SHARE if instruction in of_adapters else col.PLAIN_SHARE


@inner
def plain_share(frame_address, index, share, count, at):
    """A share of an instruction that reads neither the cache nor adapters' matrices.

    Args:
        frame_address: of the frame, the call's columns included.
        index: of the instruction.
        share: of ``count``.
        count: of all shares.
        at: where the thread's own scratch begins.
    """
    frame = longs_at(frame_address)
    op, numbers = _instruction(frame, index)
    buffers, scratch = longs_at(frame[col.BUFFERS]), floats_at(frame[col.SCRATCH])
    kind = op[col.INSTRUCTION]
    num_rows = frame[op[col.ROWS]]
    first, last = _rows_of_share(num_rows, share, count)
    if kind == col.LINEAR:
        size = panels_of_share(op, frame[col.NUM_THREADS]) * op[col.PANEL_ROWS]
        source, target = buffers[op[col.SOURCE]], buffers[op[col.TARGET]]
        linear(
            op, source, target, num_rows, share * size, min((share + 1) * size, op[col.NUM_OUT]), scratch, at
        )
    elif kind == col.EXPERT_LINEAR:
        expert_linear(op, share, _SHARES * frame[col.NUM_THREADS], buffers, scratch, at)
    elif kind == col.RESCALED:
        rescaled(op, share, frame, buffers, scratch, at)
    elif kind == col.UNNORMED:
        unnormed(op, share, frame, buffers)
    elif kind == col.GATE_LINEARS:
        gate_linears(op, share, frame, buffers)
    elif kind == col.GATE_SUBLAYER:
        gate_sublayer(op, numbers, share, frame, buffers, scratch, at)
    elif kind == col.NORM_HEADS:
        norm_heads(op, numbers, first, last, buffers)
    elif kind == col.ROUTE:
        route(op, first, last, buffers)
    elif kind == col.PAIR:
        pair(op, num_rows, buffers)
    elif kind == col.SPREAD:
        spread(op, first, last, buffers)
    elif kind == col.COMBINE:
        combine(op, first, last, buffers)
    elif kind == col.REFINE:
        refine(op, first, last, buffers, scratch, at)
    elif kind == col.REFINE_ALLOWED:
        refine_allowed(op, first, last, buffers, scratch, at)
    elif kind == col.EXACT_LOGITS:
        exact_logits(op, first, last, buffers)
    else:
        rowwise(op, numbers, first, last, frame, buffers)


@inner
def cache_share(frame_address, index, share, count, at, like):
    """The same of an instruction that reads or writes the cache, whose dtype is that of the array ``like``."""
    frame = longs_at(frame_address)
    op, numbers = _instruction(frame, index)
    buffers, scratch = longs_at(frame[col.BUFFERS]), floats_at(frame[col.SCRATCH])
    if op[col.INSTRUCTION] == col.ATTENTION:
        attend(op, numbers, share, frame, buffers, like, scratch, at)
    elif op[col.INSTRUCTION] == col.GATE_PREFIX:
        gate_prefix(op, share, frame, buffers, like, scratch, at)
    else:
        first, last = _rows_of_share(frame[op[col.ROWS]], share, count)
        rotate_and_store(op, first, last, frame, buffers, like)


@inner
def adapter_share(frame_address, index, share, at, like):
    """The same of an instruction that reads adapters' matrices, whose dtype is that of the array ``like``."""
    frame = longs_at(frame_address)
    op, numbers = _instruction(frame, index)
    buffers, scratch = longs_at(frame[col.BUFFERS]), floats_at(frame[col.SCRATCH])
    if op[col.INSTRUCTION] == col.DELTAS:
        deltas(op, share, frame, buffers, like, scratch, at)
    elif op[col.INSTRUCTION] == col.EXPERT_DELTAS:
        expert_deltas(op, share, frame, buffers, like, scratch, at)
    else:
        bottleneck(op, numbers, share, frame, buffers, like, scratch, at)


def _plain(frame_address, index, share, count, at):
    plain_share(frame_address, index, share, count, at)


def _cache_of_floats(frame_address, index, share, count, at):
    cache_share(frame_address, index, share, count, at, floats_at(0))


def _cache_of_halves(frame_address, index, share, count, at):
    cache_share(frame_address, index, share, count, at, halves_at(0))


def _cache_of_bytes(frame_address, index, share, count, at):
    cache_share(frame_address, index, share, count, at, signed_bytes_at(0))


def _adapters_of_floats(frame_address, index, share, count, at):
    adapter_share(frame_address, index, share, at, floats_at(0))


def _adapters_of_halves(frame_address, index, share, count, at):
    adapter_share(frame_address, index, share, at, halves_at(0))


_OF_CACHE = {4: _cache_of_floats, 2: _cache_of_halves, 1: _cache_of_bytes}
_OF_ADAPTERS = {4: _adapters_of_floats, 2: _adapters_of_halves}


@functools.cache
def _compiled(function):
    """A C function, compiled or loaded from disk."""
    kind = types.void(types.int64, types.int64, types.int64, types.int64, types.int64)
    return cfunc(kind, cache=True, nopython=True, error_model="numpy")(function)


@functools.cache
def addresses_of_shares(value_bytes: tuple[int, int] | None) -> Array:
    """The addresses of what carries out shares, in the order of a frame's columns.

    They are called by address so that each is compiled once, whatever the dtypes of a step: Numba would compile it
    again with each pair of them, and several times as a part of a loop on all threads.

    Args:
        value_bytes: of a value in the KV cache, 4 for float32, 2 for bfloat16, 1 for int8, and of one in adapters, 4
            or 2; None if no instruction reads either.
    """
    needed = [_plain]
    if value_bytes is not None:
        needed += [_OF_CACHE[value_bytes[0]], _OF_ADAPTERS[value_bytes[1]]]
    return np.array([_compiled(function).address for function in needed], dtype=np.int64)


@intrinsic
def _call(typingctx, address, frame_address, index, share, count, at):
    """Calls the C function at an address."""

    def codegen(context, builder, signature, args):
        integer = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [integer] * 5)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@inner
def take_part(thread, frame_address):
    """One thread's part in a program; returns when all of the program is done.

    Args:
        thread: its number in this call.
        frame_address: of the frame, the call's columns included.
    """
    frame = longs_at(frame_address)
    num_threads = frame[col.NUM_THREADS]
    at = thread * frame[col.SCRATCH_SIZE]
    taken = longs_at(frame[col.COUNTERS])
    done = longs_at(frame[col.COUNTERS] + 8 * frame[col.NUM_INSTRUCTIONS])
    times = frame[col.TIMES] if thread == 0 else 0  # one thread's clock, since all wait for each other
    if times != 0:
        _clock_gettime(_CLOCK, times)
    for index in range(frame[col.NUM_INSTRUCTIONS]):
        op, _ = _instruction(frame, index)
        count = num_shares(op, frame, num_threads)
        address = frame[_column_of(op[col.INSTRUCTION])]
        num_mine = 0
        share = next_share(taken, index) if count else 0
        while share < count:
            _call(address, frame_address, index, share, count, at)
            num_mine += 1
            share = next_share(taken, index)
        wait_for_all(done, index, num_mine, count)
        if times != 0:
            times += 16
            _clock_gettime(_CLOCK, times)


@kernel
def run(frame_address, num_threads):
    """Runs instructions one after another, each on all threads.

    Args:
        frame_address: of [FRAME_SIZE] int64.
        num_threads: to use.
    """
    for thread in prange(num_threads):
        take_part(np.int64(thread), frame_address)
