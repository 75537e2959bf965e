"""As many float32 lanes as the processor's largest registers hold, for the kernels that multiply most.

Sixteen with AVX-512, otherwise the eight of ``simd``. Everything said there of order holds here: a result depends on
the lanes' number, and so on the processor, but not on the rows beside it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.core.extending import intrinsic, register_model

from manyhats.engine.backends.cpu import simd

_F32 = ir.FloatType()
_I32 = ir.IntType(32)


LANES = 16 if simd.has_feature("avx512f") else simd.LANES
_VEC = ir.VectorType(_F32, LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}")


vector = simd.vector if LANES == simd.LANES else _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VEC)


@intrinsic
def load(typingctx, array, index):
    """Lanes array[index : index + LANES]: float32, or bfloat16 held as uint16 and widened exactly."""
    simd.check_dtype(array)

    def codegen(context, builder, signature, args):
        array_type = signature.args[0]
        ptr = simd.element(context, builder, array_type, args[0], args[1])
        return simd.load_lanes(builder, ptr, array_type.dtype, LANES)

    return vector(array, types.intp), codegen


@intrinsic
def store(typingctx, array, index, value):
    """array[index : index + LANES] = value; float32."""

    def codegen(context, builder, signature, args):
        ptr = simd.element(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(ptr, _VEC.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


@intrinsic
def splat(typingctx, value):
    """The same float32 in every lane."""

    def codegen(context, builder, signature, args):
        return simd.spread(builder, args[0], LANES)

    return vector(types.float32), codegen


@intrinsic
def zero(typingctx):
    """Zero in every lane."""

    def codegen(context, builder, signature, args):
        return ir.Constant(_VEC, [ir.Constant(_F32, 0.0)] * LANES)

    return vector(), codegen


@intrinsic
def join(typingctx, low, high):
    """Sixteen lanes of two times eight."""

    def codegen(context, builder, signature, args):
        mask = ir.Constant(ir.VectorType(_I32, 16), list(range(16)))
        return builder.shuffle_vector(args[0], args[1], mask)

    return vector(simd.vector, simd.vector), codegen
