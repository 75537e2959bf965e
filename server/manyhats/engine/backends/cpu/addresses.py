"""Arrays at memory addresses, for kernels that are given tables of addresses; their bounds are not known."""

from __future__ import annotations

from typing import Any

from numba import carray, types
from numba.core.extending import intrinsic

from manyhats.engine.backends.cpu.compile import inner


@intrinsic
def _pointer(typingctx, address, like):
    """The address as a pointer to values of the dtype of the array ``like``."""
    pointer = types.CPointer(like.dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.int64, like), codegen


@inner
def array_at(address, like):
    """The array at an address, 1-D, of the dtype of the array ``like``."""
    return carray(_pointer(address, like), 1)


def _arrays_of(dtype: types.Type) -> Any:
    pointer = types.CPointer(dtype)

    @intrinsic
    def typed(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(pointer))

        return pointer(types.int64), codegen

    @inner
    def array(address):
        return carray(typed(address), 1)

    return array


bytes_at = _arrays_of(types.uint8)
signed_bytes_at = _arrays_of(types.int8)
halves_at = _arrays_of(types.uint16)
floats_at = _arrays_of(types.float32)
ints_at = _arrays_of(types.int32)
longs_at = _arrays_of(types.int64)
