"""Eight float32 lanes as a Numba value, so that kernels say which operations run, and in which order.

A vector is an LLVM ``<8 x float>``: one AVX register, or two NEON ones; what takes one takes those of ``wide``, too.
Nothing here is reassociated by the compiler, so a kernel's result depends on the order its source states and on
nothing else: not on how many rows it is given, nor on which variant of a loop handles them.
"""

from __future__ import annotations

import struct
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.errors import TypingError
from numba.core.extending import intrinsic, register_model

from manyhats.engine.model.nf4 import NF4_CODE

LANES = 8

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I8 = ir.IntType(8)
_VEC = ir.VectorType(_F32, LANES)
_RAW16 = ir.VectorType(ir.IntType(16), LANES)

# The least relative error over |r| ≤ ln 2 / 2 with 1 + r kept, 3e-9; Taylor's coefficients give 1.2e-7.
_EXP_COEFFICIENTS = (0.0013814539, 0.0083687452, 0.0416683908, 0.1666652040, 0.4999999343, 1.0, 1.0)

# Of 2ʳ over |r| ≤ ½ with 1 kept: 9e-8.
_EXP2_COEFFICIENTS = (0.0013264727, 0.0096715130, 0.0555073358, 0.2402224243, 0.6931470037, 1.0)

# Of (tanh x / x − 1) / x² in x², least relative error of tanh over |x| < 0.625: 4e-9. Beyond, the other form
# loses nothing to cancellation.
_TANH_COEFFICIENTS = (-0.0057049775, 0.0206390787, -0.0537397116, 0.1333144158, -0.3333328068)
_TANH_NEAR = 0.625

# Of erf x / x − 1 in x² over |x| < 1, of least error: 1.2e-9. Of log erfc x over 1 ≤ x ≤ 4, least error of erfc: 2e-11.
_ERF_COEFFICIENTS = (
    7.88911955e-05,
    -0.000802084128,
    0.00518953534,
    -0.0268544446,
    0.112836002,
    -0.376126271,
    0.128379166,
)
_LOG_ERFC_COEFFICIENTS = (
    -2.16868499e-05,
    0.000441336377,
    -0.00420456187,
    0.0252082567,
    -0.108418577,
    -0.633219893,
    -1.12957842,
    0.00018804023,
)


def has_feature(name: str) -> bool:
    """Whether this is an x86 processor with a feature of that name, as LLVM calls it."""
    is_x86 = llvm.get_process_triple().startswith(("x86_64", "i686"))
    return is_x86 and bool(llvm.get_host_cpu_features().get(name))


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}")


vector = _Vector()
quad = types.UniTuple(vector, 4)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VEC)


def element(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """A pointer to array[index]."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _const_f32(value: float) -> ir.Constant:
    """The float32 nearest to value, as LLVM wants it: a double that holds it exactly."""
    return ir.Constant(_F32, struct.unpack("f", struct.pack("f", value))[0])


def _floats(like: Any, value: float) -> ir.Constant:
    """The float32 nearest to value in as many lanes as another vector has."""
    return ir.Constant(ir.VectorType(_F32, like.type.count), [_const_f32(value)] * like.type.count)


def _ints(like: Any, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, like.type.count), [value] * like.type.count)


def _as_ints(builder: Any, value: Any) -> Any:
    """A vector's bits."""
    return builder.bitcast(value, ir.VectorType(_I32, value.type.count))


def _as_floats(builder: Any, bits: Any) -> Any:
    return builder.bitcast(bits, ir.VectorType(_F32, bits.type.count))


def _widen(builder: Any, raw: Any, lanes: int) -> Any:
    """bfloat16 bits as float32, exactly."""
    integers = ir.VectorType(_I32, lanes)
    bits = builder.shl(builder.zext(raw, integers), ir.Constant(integers, [16] * lanes))
    return builder.bitcast(bits, ir.VectorType(_F32, lanes))


def narrow(builder: Any, value: Any) -> Any:
    """float32 to bfloat16 bits, to nearest even; NaN stays NaN."""
    bits = _as_ints(builder, value)
    odd = builder.and_(builder.lshr(bits, _ints(bits, 16)), _ints(bits, 1))
    rounded = builder.add(bits, builder.add(odd, _ints(bits, 0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(is_nan, _ints(bits, 0x7FC00000), rounded)
    return builder.trunc(
        builder.lshr(rounded, _ints(bits, 16)), ir.VectorType(ir.IntType(16), bits.type.count)
    )


def load_lanes(builder: Any, ptr: Any, dtype: Any, lanes: int = LANES) -> Any:
    """``lanes`` values at a pointer: float32, or bfloat16 widened."""
    is_float = dtype == types.float32
    kind = ir.VectorType(_F32 if is_float else ir.IntType(16), lanes)
    raw = builder.load(builder.bitcast(ptr, kind.as_pointer()), align=4 if is_float else 2)
    return raw if is_float else _widen(builder, raw, lanes)


def check_dtype(array: Any) -> None:
    """Check that vectors can be loaded from an array."""
    if array.dtype not in (types.float32, types.uint16):
        raise TypingError(f"vectors are loaded from float32 or bfloat16 (as uint16), not {array.dtype}")


@intrinsic
def load(typingctx, array, index):
    """Lanes array[index : index + 8]: float32, or bfloat16 held as uint16 and widened exactly."""
    check_dtype(array)

    def codegen(context, builder, signature, args):
        array_type = signature.args[0]
        return load_lanes(builder, element(context, builder, array_type, args[0], args[1]), array_type.dtype)

    return vector(array, types.intp), codegen


@intrinsic
def load_address(typingctx, address, like):
    """Eight lanes at a memory address, of the dtype of the array ``like``."""
    check_dtype(like)

    def codegen(context, builder, signature, args):
        ptr = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        return load_lanes(builder, ptr, signature.args[1].dtype)

    return vector(types.int64, like), codegen


def ask_ahead(builder: Any, pointer: Any, near: int) -> None:
    """Asks for the cache line at a byte pointer; ``near`` is 3 for the nearest cache, 2 for the next."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, data = ir.Constant(_I32, 0), ir.Constant(_I32, 1)
    builder.call(function, [pointer, read, ir.Constant(_I32, near), data])


@intrinsic
def prefetch(typingctx, address):
    """Asks for the cache line at a memory address ahead of its use; an address out of reach does no harm."""

    def codegen(context, builder, signature, args):
        ask_ahead(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), near=2)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def store(typingctx, array, index, value):
    """array[index : index + 8] = value: float32, or rounded to bfloat16 held as uint16."""
    check_dtype(array)

    def codegen(context, builder, signature, args):
        array_type = signature.args[0]
        ptr = element(context, builder, array_type, args[0], args[1])
        if array_type.dtype == types.float32:
            builder.store(args[2], builder.bitcast(ptr, _VEC.as_pointer()), align=4)
        else:
            builder.store(narrow(builder, args[2]), builder.bitcast(ptr, _RAW16.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


def spread(builder: Any, value: Any, lanes: int) -> Any:
    """A vector with a value in every lane."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


@intrinsic
def splat(typingctx, value):
    """The same float32 in every lane."""

    def codegen(context, builder, signature, args):
        return spread(builder, args[0], LANES)

    return vector(types.float32), codegen


@intrinsic
def alike(typingctx, vector_value, value):
    """A float32 in as many lanes as another vector has."""

    def codegen(context, builder, signature, args):
        return spread(builder, args[1], args[0].type.count)

    return vector_value(vector_value, types.float32), codegen


@intrinsic
def zero(typingctx):
    """Zero in every lane."""

    def codegen(context, builder, signature, args):
        return ir.Constant(_VEC, [_const_f32(0.0)] * LANES)

    return vector(), codegen


def _binary(name: str, emit: Any, doc: str) -> Any:
    def op(typingctx, a, b):
        def codegen(context, builder, signature, args):
            return emit(builder, args[0], args[1])

        return a(a, b), codegen

    op.__name__ = name
    op.__doc__ = doc
    return intrinsic(op)


add = _binary("add", lambda b, x, y: b.fadd(x, y), "Lane-wise x + y.")
sub = _binary("sub", lambda b, x, y: b.fsub(x, y), "Lane-wise x − y.")
mul = _binary("mul", lambda b, x, y: b.fmul(x, y), "Lane-wise x · y.")
div = _binary("div", lambda b, x, y: b.fdiv(x, y), "Lane-wise x / y.")
maximum = _binary(
    "maximum",
    lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y),
    "Lane-wise maximum; y where x is NaN.",
)


@intrinsic
def at_least(typingctx, a, limit, value):
    """The lanes of value where a ≥ limit, 0 elsewhere."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">=", args[0], args[1]), args[2], _floats(args[2], 0.0))

    return vector(vector, vector, vector), codegen


def call_llvm(builder: Any, name: str, result: Any, operands: list[Any]) -> Any:
    """The value of one of LLVM's own functions."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


@intrinsic
def fma(typingctx, a, b, c):
    """Lane-wise a · b + c, rounded once."""

    def codegen(context, builder, signature, args):
        return _fma(builder, *args)

    return a(a, b, c), codegen


def tree(builder: Any, value: Any, combine: Any, lanes: int = LANES) -> Any:
    """The lanes of a vector combined by halves."""
    width = lanes // 2
    while width:
        mask = [(lane + width) % lanes for lane in range(lanes)]
        shuffled = builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, lanes), mask))
        value = combine(value, shuffled)
        width //= 2
    return builder.extract_element(value, ir.Constant(_I32, 0))


@intrinsic
def store_apart(typingctx, array, index, step, value):
    """array[index + i · step] = lane i of value: float32, or rounded to bfloat16 held as uint16."""
    check_dtype(array)

    def codegen(context, builder, signature, args):
        array_type, (array, index, step, value) = signature.args[0], args
        lanes = value if array_type.dtype == types.float32 else narrow(builder, value)
        for lane in range(lanes.type.count):
            one = builder.extract_element(lanes, ir.Constant(_I32, lane))
            builder.store(one, element(context, builder, array_type, array, index))
            index = builder.add(index, step)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, vector), codegen


@intrinsic
def sum_lanes(typingctx, value):
    """The sum of the lanes, by halves: always in the same order."""

    def codegen(context, builder, signature, args):
        return tree(builder, args[0], builder.fadd, args[0].type.count)

    return types.float32(value), codegen


@intrinsic
def max_lanes(typingctx, value):
    """The largest lane."""

    def codegen(context, builder, signature, args):
        def larger(x, y):
            return builder.select(builder.fcmp_ordered(">", x, y), x, y)

        return tree(builder, args[0], larger, args[0].type.count)

    return types.float32(value), codegen


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_llvm(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


def _polynomial(builder: Any, coefficients: tuple[float, ...], x: Any) -> Any:
    """Horner's rule, the highest power's coefficient first."""
    value = _floats(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(builder, value, x, _floats(x, coefficient))
    return value


def _exp(builder: Any, value: Any) -> Any:
    low, high = _floats(value, -87.3), _floats(value, 88.0)
    below = builder.fcmp_ordered("<", value, low)
    x = builder.select(below, low, value)
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    scaled = builder.fmul(x, _floats(x, 1.4426950408889634))
    n = call_llvm(builder, f"llvm.nearbyint.v{x.type.count}f32", x.type, [scaled])
    r = _fma(builder, n, _floats(x, -0.693359375), x)
    r = _fma(builder, n, _floats(x, 2.12194440e-4), r)
    poly = _polynomial(builder, _EXP_COEFFICIENTS, r)
    exponent = builder.add(builder.fptosi(n, ir.VectorType(_I32, n.type.count)), _ints(n, 127))
    result = builder.fmul(poly, _as_floats(builder, builder.shl(exponent, _ints(exponent, 23))))
    result = builder.select(below, _floats(x, 0.0), result)
    return builder.select(builder.fcmp_unordered("uno", value, value), value, result)


@intrinsic
def exp(typingctx, value):
    """Lane-wise eˣ: x = n·ln 2 + r, a degree-6 polynomial in r, and n into the exponent; error under 1 ulp.

    Below −87.3 the result is exactly 0, above 88 that of 88; NaN stays NaN.
    """

    def codegen(context, builder, signature, args):
        return _exp(builder, args[0])

    return value(value), codegen


@intrinsic
def exp2(typingctx, value):
    """Lane-wise 2ˣ for x ≤ 0, cheaper than ``exp``: n + r by rounding, a degree-5 polynomial in r; error under 2 ulp.

    At 0 it is exactly 1, below −126 exactly 0; NaN stays NaN.
    """

    def codegen(context, builder, signature, args):
        x = args[0]
        # Adding 1.5 · 2²³ rounds to an integer, and leaves it in the low bits of the sum.
        magic = _floats(x, 12582912.0)
        shifted = builder.fadd(x, magic)
        r = builder.fsub(x, builder.fsub(shifted, magic))
        exponent = builder.shl(_as_ints(builder, shifted), _ints(x, 23))
        power = _as_floats(builder, builder.add(exponent, _ints(x, 0x3F800000)))
        result = builder.fmul(_polynomial(builder, _EXP2_COEFFICIENTS, r), power)
        kept = builder.fcmp_unordered(">=", x, _floats(x, -126.0))
        return builder.select(kept, result, _floats(x, 0.0))

    return value(value), codegen


@intrinsic
def tanh(typingctx, value):
    """Lane-wise tanh x: 1 − 2 / (e²ˣ + 1) with the sign put back, near 0 x + x³ · P(x²); error under 2 ulp.

    NaN stays NaN.
    """

    def codegen(context, builder, signature, args):
        x = args[0]
        bits = _as_ints(builder, x)
        sign = builder.and_(bits, _ints(bits, -0x80000000))
        size = _as_floats(builder, builder.and_(bits, _ints(bits, 0x7FFFFFFF)))
        one = _floats(x, 1.0)
        power = _exp(builder, builder.fadd(size, size))
        far = builder.fsub(one, builder.fdiv(_floats(x, 2.0), builder.fadd(power, one)))
        far = _as_floats(builder, builder.or_(_as_ints(builder, far), sign))
        square = builder.fmul(x, x)
        cube = builder.fmul(square, x)
        near = _fma(builder, cube, _polynomial(builder, _TANH_COEFFICIENTS, square), x)
        return builder.select(builder.fcmp_ordered("<", size, _floats(x, _TANH_NEAR)), near, far)

    return value(value), codegen


@intrinsic
def erf(typingctx, value):
    """Lane-wise erf x: 1 − e^Q(|x|) with the sign put back, below 1 x + x · P(x²); error 1.1 ulp, and 6.5e-8 at most.

    NaN stays NaN.
    """

    def codegen(context, builder, signature, args):
        x = args[0]
        bits = _as_ints(builder, x)
        sign = builder.and_(bits, _ints(bits, -0x80000000))
        size = _as_floats(builder, builder.and_(bits, _ints(bits, 0x7FFFFFFF)))
        four = _floats(x, 4.0)
        bounded = builder.select(builder.fcmp_unordered("<", size, four), size, four)
        power = _exp(builder, _polynomial(builder, _LOG_ERFC_COEFFICIENTS, bounded))
        far = builder.fsub(_floats(x, 1.0), power)
        far = _as_floats(builder, builder.or_(_as_ints(builder, far), sign))
        near = _fma(builder, x, _polynomial(builder, _ERF_COEFFICIENTS, builder.fmul(x, x)), x)
        return builder.select(builder.fcmp_ordered("<", size, _floats(x, 1.0)), near, far)

    return value(value), codegen


NF4_VALUES = np.array(NF4_CODE, dtype=np.float32)


@intrinsic
def decode_nf4(typingctx, array, index):
    """NF4 values of the 32 codes in array[index : index + 16], uint8, as four vectors.

    Byte i < 16 holds element 8·(i // 4) + i % 4 of the group in its low nibble and the element four further
    on in its high one (``packing.interleave_nibbles`` makes that order). With AVX2 the four bytes of each
    float come from four byte shuffles, and two rounds of unpacking put them in place.
    """

    def codegen(context, builder, signature, args):
        raw_type = ir.VectorType(_I8, 16)
        ptr = element(context, builder, signature.args[0], args[0], args[1])
        raw = builder.load(builder.bitcast(ptr, raw_type.as_pointer()), align=1)
        four, fifteen = (ir.Constant(raw_type, [value] * 16) for value in (4, 15))
        codes = builder.shuffle_vector(
            builder.and_(raw, fifteen),
            builder.lshr(raw, four),
            ir.Constant(ir.VectorType(_I32, 32), list(range(32))),
        )
        lookup = _lookup_bytes if has_feature("avx2") else _lookup_elements
        return context.make_tuple(builder, quad, lookup(builder, codes))

    return quad(array, types.intp), codegen


def _lookup_bytes(builder: Any, codes: Any) -> list[Any]:
    wide = ir.VectorType(_I8, 32)

    def interleave(a: Any, b: Any, width: int) -> list[Any]:
        """Unpack low and high within each half, as AVX2 does, in units of width bytes."""
        results = []
        units = 32 // width
        for first in (0, units // 4):
            mask = []
            for half in (0, units // 2):
                for unit in range(units // 4):
                    position = half + first + unit
                    mask += [position * width + byte for byte in range(width)]
                    mask += [32 + position * width + byte for byte in range(width)]
            results.append(builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, 32), mask)))
        return results

    planes = []
    for plane in range(4):
        table = NF4_VALUES.view(np.uint8).reshape(16, 4)[:, plane].tolist() * 2
        planes.append(call_llvm(builder, "llvm.x86.avx2.pshuf.b", wide, [ir.Constant(wide, table), codes]))
    low_halves = interleave(planes[0], planes[1], 1)
    high_halves = interleave(planes[2], planes[3], 1)
    vectors = []
    for low, high in zip(low_halves, high_halves, strict=True):
        vectors += [builder.bitcast(v, _VEC) for v in interleave(low, high, 2)]
    return vectors


def _lookup_elements(builder: Any, codes: Any) -> list[Any]:
    table = ir.Constant(ir.ArrayType(_F32, 16), [_const_f32(v) for v in NF4_VALUES])
    slot = cgutils.alloca_once_value(builder, table)
    vectors = []
    for group in range(4):
        result = ir.Constant(_VEC, ir.Undefined)
        for lane in range(LANES):
            source = 4 * group + lane % 4 + 16 * (lane // 4)
            code = builder.zext(builder.extract_element(codes, ir.Constant(_I32, source)), _I32)
            entry = builder.load(builder.gep(slot, [ir.Constant(_I32, 0), code]))
            result = builder.insert_element(result, entry, ir.Constant(_I32, lane))
        vectors.append(result)
    return vectors
