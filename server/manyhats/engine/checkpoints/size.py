"""How much memory a model's weights take, from its config alone."""

from __future__ import annotations

import math

from manyhats.engine.checkpoints.checkpoint import expected_shapes
from manyhats.engine.model.layout import Family

# Two codes per byte, a byte of scale per 64, four of the scales' own scale per 64 * 256.
_NF4_BYTES_PER_PARAMETER = 1 / 2 + 1 / 64 + 4 / (64 * 256)


def num_parameters(family: Family) -> int:
    """All parameters of a model."""
    return sum(math.prod(shape) for shape in expected_shapes(family).values())


def weight_bytes(family: Family, *, is_nf4: bool, element_bytes: int = 2) -> int:
    """Bytes of a model's weights as they are served.

    Args:
        family: the model.
        is_nf4: whether the layers' linears are.
        element_bytes: of every other value.
    """
    num_linear = family.architecture.num_linear_parameters()
    per_linear = _NF4_BYTES_PER_PARAMETER if is_nf4 else element_bytes
    return round(num_linear * per_linear + element_bytes * (num_parameters(family) - num_linear))
