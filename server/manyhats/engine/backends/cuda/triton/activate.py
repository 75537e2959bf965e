"""The activations of bottleneck adapters, chosen by a number that is read on the device."""

import math

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

SQRT_HALF = tl.constexpr(math.sqrt(0.5))
SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2.0 / math.pi))
LAPLACE_MEAN = tl.constexpr(0.707107)
LAPLACE_FACTOR = tl.constexpr(1.0 / (0.282095 * math.sqrt(2.0)))


@triton.jit
def sigmoid(v):
    """``1 / (1 + e⁻ᵛ)``, without overflow."""
    e = tl.exp(-tl.abs(v))
    return tl.where(v < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(v):
    """``sign(v) · (1 − e) / (1 + e)``, e = exp(−2 |v|)."""
    e = tl.exp(-2.0 * tl.abs(v))
    found = (1.0 - e) / (1.0 + e)
    return tl.where(v < 0.0, -found, found)


@triton.jit
def softplus(v):
    """``ln(1 + eᵛ) = max(v, 0) + 2 artanh(e / (2 + e))``, e = exp(−|v|): exact where e is small."""
    e = tl.exp(-tl.abs(v))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 15.0 + q / 17.0
    series = 1.0 / 13.0 + q * series
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return tl.maximum(v, 0.0) + 2.0 * s * (1.0 + q * series)


@triton.jit
def gelu(v):
    """``v · Φ(v)``."""
    return 0.5 * v * (1.0 + tl.erf(v * SQRT_HALF))


@triton.jit
def activate(kind, v):
    """A tile of float32 through the activation of index ``kind``, which is the same for the whole tile."""
    if kind == RELU:
        v = tl.maximum(v, 0.0)
    elif kind == GELU:
        v = gelu(v)
    elif kind == GELU_TANH:
        v = 0.5 * v * (1.0 + tanh((v + 0.044715 * v * v * v) * SQRT_2_OVER_PI))
    elif kind == SILU:
        v = v * sigmoid(v)
    elif kind == TANH:
        v = tanh(v)
    elif kind == SIGMOID:
        v = sigmoid(v)
    elif kind == LEAKY_RELU:
        v = tl.where(v >= 0.0, v, 0.01 * v)
    elif kind == QUICK_GELU:
        v = v * sigmoid(1.702 * v)
    elif kind == MISH:
        v = v * tanh(softplus(v))
    elif kind == RELU6:
        v = tl.minimum(tl.maximum(v, 0.0), 6.0)
    elif kind == RELU2:
        v = tl.maximum(v, 0.0) * tl.maximum(v, 0.0)
    elif kind == HARDSWISH:
        v = v * tl.minimum(tl.maximum(v + 3.0, 0.0), 6.0) / 6.0
    elif kind == LAPLACE:
        v = 0.5 * (1.0 + tl.erf((v - LAPLACE_MEAN) * LAPLACE_FACTOR))
    elif kind == GELU_10:
        v = tl.minimum(tl.maximum(gelu(v), -10.0), 10.0)
    elif kind == SQRT_SOFTPLUS:
        v = tl.sqrt(softplus(v))
    return v
