"""Norms of whole rows on CUDA, alone or behind the sum that they read.

Weights are what the values are multiplied with: what a family's files leave out of them has been added on loading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton

from manyhats.engine.backends.cuda.triton import norms as kernels
from manyhats.engine.model.architecture import Norm

if TYPE_CHECKING:
    from torch import Tensor

    from manyhats.engine.model.weights import NormWeight


def norm(x: Tensor, spec: Norm, weight: NormWeight, out: Tensor) -> None:
    """Launches the norm of each row, as ``Norm`` states it.

    Args:
        x: [M, D] float32 or bfloat16; rows may be apart.
        spec: of span ``row``.
        weight: on the device.
        out: [M, D] float32 or bfloat16; rows may be apart. It may be x.
    """
    kernels.norm[(x.shape[0],)](
        x,
        weight.weight,
        _bias_of(weight),
        out,
        x.stride(0),
        out.stride(0),
        spec.eps,
        **constants_of(spec, x.shape[1]),
        **options_of(x.shape[1]),
    )


def add_norm(
    stream: Tensor, delta: Tensor, scale: float, spec: Norm, weight: NormWeight, out: Tensor
) -> None:
    """Launches ``stream += scale · delta`` and ``out = norm(stream)``.

    Args:
        stream: [M, D] float32. If it is also ``out``, only the norm is kept of it.
        delta: [M, D] float32 or bfloat16, a sub-layer's output; rows may be apart.
        scale: dimensionless.
        spec: of span ``row``.
        weight: on the device.
        out: [M, D] float32 or bfloat16.
    """
    kernels.add_norm[(stream.shape[0],)](
        stream,
        delta,
        weight.weight,
        _bias_of(weight),
        out,
        delta.stride(0),
        scale,
        spec.eps,
        **constants_of(spec, stream.shape[1]),
        KEEPS_SUM=out.data_ptr() != stream.data_ptr(),
        **options_of(stream.shape[1]),
    )


def constants_of(spec: Norm, size: int) -> dict[str, int | bool]:
    """The constants that both kernels are compiled for."""
    return {
        "D": size,
        "BD": triton.next_power_of_2(size),
        "IS_LAYER": spec.kind == "layer",
        "HAS_BIAS": spec.has_bias,
    }


def options_of(size: int) -> dict[str, Any]:
    """How both kernels are compiled: a thread has 16 values or so."""
    return {
        "num_warps": max(1, min(16, triton.next_power_of_2(size) // 512)),
        "enable_fp_fusion": False,
    }


def _bias_of(weight: NormWeight) -> Tensor:
    """A pointer that is not read where there is no bias."""
    return weight.weight if weight.bias is None else weight.bias
