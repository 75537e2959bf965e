"""Norms of the rows that models have."""

from __future__ import annotations

from manyhats.engine.backends.cuda.norms import constants_of, options_of
from manyhats.engine.backends.cuda.triton.norms import add_norm, norm
from manyhats.engine.model.architecture import Norm
from support.gpu.compiling import Entry

TYPES = {
    **dict.fromkeys(("x", "stream", "delta", "weight", "bias"), "*fp32"),
    **dict.fromkeys(("X_STRIDE", "Y_STRIDE", "DELTA_STRIDE"), "i32"),
    **dict.fromkeys(("EPS", "SCALE"), "fp32"),
    "y": "*bf16",
}
RMS, LAYER = Norm(1e-5), Norm(1e-5, kind="layer", has_bias=True)


def entry(kernel: object, sm: int, spec: Norm, size: int, **constants: bool) -> Entry:
    return Entry(
        kernel,
        sm,
        TYPES,
        {**constants_of(spec, size), **constants},
        aligned=frozenset(("X_STRIDE", "Y_STRIDE", "DELTA_STRIDE")),
        **options_of(size),
    )


ENTRIES = [
    entry(norm, 86, RMS, 4096),
    entry(norm, 80, LAYER, 768),
    entry(add_norm, 89, RMS, 5120, KEEPS_SUM=True),
    entry(add_norm, 90, RMS, 8192, KEEPS_SUM=True),
]
