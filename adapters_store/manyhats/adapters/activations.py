"""Activation functions by the names that adapter configs use: transformers' names, and one of AdapterHub's.

Several names may mean one function; ``ACTIVATIONS`` holds each function once, and lowering stores its name there. An
engine needs only the functions in ``ACTIVATIONS``.

Source: transformers' ``activations.py``, whose ``ACT2FN`` AdapterHub looks names up in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError, shown

Activation = Callable[[Tensor], Tensor]


def gelu(x: Tensor) -> Tensor:
    """``x · Φ(x)``, Φ the standard normal distribution. Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415)."""
    return functional.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """``gelu`` by tanh: ``x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))``. Source: arXiv:1606.08415, section 2."""
    return functional.gelu(x, approximate="tanh")


def gelu_10(x: Tensor) -> Tensor:
    """``gelu`` clipped to [−10, 10]. Source: Wu et al. 2020 (arXiv:2004.09602)."""
    return functional.gelu(x).clamp(-10.0, 10.0)


def quick_gelu(x: Tensor) -> Tensor:
    """``x · sigmoid(1.702 x)``. Source: arXiv:1606.08415, section 2."""
    return x * torch.sigmoid(1.702 * x)


def laplace(x: Tensor) -> Tensor:
    """``(1 + erf((x − μ) / (σ √2))) / 2``, μ = 0.707107, σ = 0.282095. Source: Ma et al. 2022 (arXiv:2209.10655)."""
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)²``. Source: So et al. 2021 (arXiv:2109.08668)."""
    return torch.square(functional.relu(x))


def leaky_relu(x: Tensor) -> Tensor:
    """``x`` where positive, ``0.01 x`` elsewhere."""
    return functional.leaky_relu(x, 0.01)


def identity(x: Tensor) -> Tensor:
    """``x``."""
    return x


def sqrt_softplus(x: Tensor) -> Tensor:
    """``√(ln(1 + eˣ))``."""
    return functional.softplus(x).sqrt()


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": gelu,
        "gelu_10": gelu_10,
        "gelu_pytorch_tanh": gelu_tanh,
        "hardswish": functional.hardswish,
        "laplace": laplace,
        "leaky_relu": leaky_relu,
        "linear": identity,
        "mish": functional.mish,
        "quick_gelu": quick_gelu,
        "relu": functional.relu,
        "relu2": squared_relu,
        "relu6": functional.relu6,
        "sigmoid": torch.sigmoid,
        "silu": functional.silu,
        "sqrtsoftplus": sqrt_softplus,
        "tanh": torch.tanh,
    }
)
"""Name → function, elementwise, of any float dtype."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "gelu_accurate": "gelu_pytorch_tanh",
        "gelu_fast": "gelu_pytorch_tanh",
        "gelu_new": "gelu_pytorch_tanh",
        "gelu_python": "gelu",
        "gelu_python_tanh": "gelu_pytorch_tanh",
        "leakyrelu": "leaky_relu",
        "swish": "silu",
    }
)
"""Other names → the name in ``ACTIVATIONS`` of the same function, up to rounding."""

_LEARNED = frozenset(("prelu", "xielu"))


def activation_name(key: str, value: object) -> str:
    """The name in ``ACTIVATIONS`` of the function that a config's ``key`` names; case does not matter.

    Raises:
        AdapterInvalidError: it is not a name.
        AdapterUnsupportedError: an unknown function, or one that has parameters of its own.
    """
    if not isinstance(value, str):
        raise AdapterInvalidError(key, "must be the name of an activation function")
    name = ALIASES.get(value.lower(), value.lower())
    if name in _LEARNED:
        raise AdapterUnsupportedError(key, f"'{name}' has parameters of its own, which are not served")
    if name not in ACTIVATIONS:
        known = ", ".join(sorted({*ACTIVATIONS, *ALIASES}))
        raise AdapterUnsupportedError(
            key, f"'{shown(value)}' is not an activation that is served; these are: {known}"
        )
    return name
