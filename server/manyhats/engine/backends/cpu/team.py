"""How the threads of one call divide its work among themselves.

Each operation is divided into shares. A thread takes the next free share until none is left, then waits until all are
done; only then may the next operation read what this one wrote. No particular thread is needed: if one arrives late, or
never, the others take its shares.

Waking a sleeping thread costs as much as a small operation, so threads wait awake: a few microseconds in a loop, then
by yielding the processor again and again, so that a thread that has lost its own can continue.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from manyhats.engine.backends.cpu.compile import inner

_SPINS = 300
_IS_X86 = llvm.get_process_triple().startswith(("x86_64", "i686"))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def _fetch_add(typingctx, counters, index, value):
    """Adds to counters[index], int64, atomically; returns what it was before."""

    def codegen(context, builder, signature, args):
        counter = _element(context, builder, signature, args)
        return builder.atomic_rmw("add", counter, args[2], "acq_rel")

    return types.int64(counters, types.intp, types.int64), codegen


@intrinsic
def _read(typingctx, counters, index):
    """Loads counters[index], int64; whatever other threads wrote before they changed it is visible then."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_element(context, builder, signature, args), "acquire", 8)

    return types.int64(counters, types.intp), codegen


def _element(context, builder, signature, args):
    return builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])


@intrinsic
def _pause(typingctx):
    """Lets the core's other hardware thread run for a moment."""

    def codegen(context, builder, signature, args):
        if _IS_X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@inner
def next_share(taken, operation):
    """The number of the next free share; past the last if none is left."""
    return _fetch_add(taken, operation, 1)


@inner
def wait_for_all(done, operation, count, total):
    """Reports ``count`` shares of an operation as done by this thread; returns once all are."""
    if count:
        _fetch_add(done, operation, count)
    spins = 0
    while _read(done, operation) < total:
        spins += 1
        if spins < _SPINS:
            _pause()
        else:
            _sched_yield()
