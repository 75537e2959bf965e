"""K11: activations, gated and plain, and the scaling of logits.

Functions are those of ``manyhats.adapters.activations``, by the same names, in float32. A NaN stays one.
"""

import triton
import triton.language as tl

from manyhats.engine.backends.cuda.record import ACTIVATIONS

RELU = tl.constexpr(ACTIVATIONS.index("relu"))
GELU = tl.constexpr(ACTIVATIONS.index("gelu"))
GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_pytorch_tanh"))
SILU = tl.constexpr(ACTIVATIONS.index("silu"))
TANH = tl.constexpr(ACTIVATIONS.index("tanh"))
SIGMOID = tl.constexpr(ACTIVATIONS.index("sigmoid"))
LEAKY_RELU = tl.constexpr(ACTIVATIONS.index("leaky_relu"))
QUICK_GELU = tl.constexpr(ACTIVATIONS.index("quick_gelu"))
MISH = tl.constexpr(ACTIVATIONS.index("mish"))
RELU6 = tl.constexpr(ACTIVATIONS.index("relu6"))
RELU2 = tl.constexpr(ACTIVATIONS.index("relu2"))
HARDSWISH = tl.constexpr(ACTIVATIONS.index("hardswish"))
LAPLACE = tl.constexpr(ACTIVATIONS.index("laplace"))
GELU_10 = tl.constexpr(ACTIVATIONS.index("gelu_10"))
SQRT_SOFTPLUS = tl.constexpr(ACTIVATIONS.index("sqrtsoftplus"))


@triton.jit
def _relu(x):
    """``max(x, 0)``."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def sigmoid(x):
    """``1 / (1 + e⁻ˣ)``, by ``e^(−|x|)``, which does not overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """``(1 − e) / (1 + e)``, ``e = e^(−2 |x|)``, with the sign of x; near 0, where that cancels, its series."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(s < 0.0625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _softplus(x):
    """``ln(1 + eˣ)`` as ``max(x, 0) + ln(1 + e)``, ``e = e^(−|x|)``; a small e is not lost in the sum.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 1.14.1.
    """
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, e * (tl.log(u) / tl.where(u == 1.0, 1.0, u - 1.0)))
    return _relu(x) + log1p


@triton.jit
def _gelu(x):
    """``x · Φ(x)``."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activated(x, NAME: tl.constexpr):
    """The activation of a name, elementwise: float32 of any shape → the same."""
    if NAME == "gelu":
        y = _gelu(x)
    elif NAME == "gelu_10":
        y = _gelu(x)
        y = tl.where(y > 10.0, 10.0, y)  # it is nowhere below −0.2
    elif NAME == "gelu_pytorch_tanh":
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "hardswish":
        shifted = _relu(x + 3.0)
        y = x * tl.where(shifted > 6.0, 6.0, shifted) / 6.0
    elif NAME == "laplace":
        y = 0.5 * (1.0 + tl.erf((x - 0.707107) * (1.0 / (0.282095 * 1.4142135623730951))))
    elif NAME == "leaky_relu":
        y = tl.where(x < 0.0, 0.01 * x, x)
    elif NAME == "linear":
        y = x
    elif NAME == "mish":
        y = x * tanh(_softplus(x))
    elif NAME == "quick_gelu":
        y = x * sigmoid(1.702 * x)
    elif NAME == "relu":
        y = _relu(x)
    elif NAME == "relu2":
        y = _relu(x) * _relu(x)
    elif NAME == "relu6":
        y = _relu(x)
        y = tl.where(y > 6.0, 6.0, y)
    elif NAME == "sigmoid":
        y = sigmoid(x)
    elif NAME == "silu":
        y = x * sigmoid(x)
    elif NAME == "sqrtsoftplus":
        y = tl.sqrt(_softplus(x))
    elif NAME == "tanh":
        y = tanh(x)
    else:
        tl.static_assert(False, "not an activation that is known")
    return y


@triton.jit
def activated_by(kind, x):
    """The activation of index ``kind`` in a record, which is read on the device: the same for a whole tile."""
    if kind == RELU:
        x = activated(x, "relu")
    elif kind == GELU:
        x = activated(x, "gelu")
    elif kind == GELU_TANH:
        x = activated(x, "gelu_pytorch_tanh")
    elif kind == SILU:
        x = activated(x, "silu")
    elif kind == TANH:
        x = activated(x, "tanh")
    elif kind == SIGMOID:
        x = activated(x, "sigmoid")
    elif kind == LEAKY_RELU:
        x = activated(x, "leaky_relu")
    elif kind == QUICK_GELU:
        x = activated(x, "quick_gelu")
    elif kind == MISH:
        x = activated(x, "mish")
    elif kind == RELU6:
        x = activated(x, "relu6")
    elif kind == RELU2:
        x = activated(x, "relu2")
    elif kind == HARDSWISH:
        x = activated(x, "hardswish")
    elif kind == LAPLACE:
        x = activated(x, "laplace")
    elif kind == GELU_10:
        x = activated(x, "gelu_10")
    elif kind == SQRT_SOFTPLUS:
        x = activated(x, "sqrtsoftplus")
    return x


@triton.jit
def activate(
    x, y, X_STRIDE, SIZE, NAME: tl.constexpr, IS_GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``y = act(x)``, or of x = (gate, up) ``y = act(gate) · up``.

    Args:
        x: [M, SIZE], or [M, 2 · SIZE] if ``IS_GATED``, float32 or bfloat16, rows ``X_STRIDE`` apart.
        y: [M, SIZE] float32 or bfloat16.

    Grid: M, SIZE / BLOCK.
    """
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_value = i < SIZE
    v = activated(tl.load(x + row * X_STRIDE + i, mask=is_value, other=0.0).to(tl.float32), NAME)
    if IS_GATED:
        v = v * tl.load(x + row * X_STRIDE + SIZE + i, mask=is_value, other=0.0).to(tl.float32)
    tl.store(y + row * SIZE + i, v.to(y.dtype.element_ty), mask=is_value)


@triton.jit
def scale_logits(
    x, STRIDE, SIZE, DIVISOR, CAP, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """In place ``x / DIVISOR``, with a cap ``CAP · tanh(x / DIVISOR / CAP)``; divisions are rounded to the nearest.

    Args:
        x: [M, SIZE] float32, rows ``STRIDE`` apart.

    Grid: M, SIZE / BLOCK.
    """
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_value = i < SIZE
    v = tl.div_rn(tl.load(x + row * STRIDE + i, mask=is_value, other=0.0), DIVISOR)
    if HAS_CAP:
        v = CAP * tanh(tl.div_rn(v, CAP))
    tl.store(x + row * STRIDE + i, v, mask=is_value)
