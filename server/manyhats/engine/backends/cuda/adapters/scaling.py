"""Launches a group's linears once more, for adapters that rescale the input of some of them."""

from __future__ import annotations

from torch import Tensor

from manyhats.engine.backends.cuda.adapters.layout import GroupPlace
from manyhats.engine.backends.cuda.adapters.step import SCALED_ROWS, StepAdapters, Workspace
from manyhats.engine.backends.cuda.linears.linear import CudaLinear, LinearWorkspace, linear
from manyhats.engine.backends.cuda.record import LinearWord
from manyhats.engine.backends.cuda.triton import scaling

_TILE = 512


def rescale_members(
    step: StepAdapters,
    place: GroupPlace,
    x: Tensor,
    weights: CudaLinear,
    y: Tensor,
    work: Workspace,
    products: LinearWorkspace,
) -> None:
    """Put what linears give for inputs of their own in the place of what they gave for the group's.

    All of the group is run on each such input, of which one linear's outputs are used: few adapters rescale inputs of
    linears that share them, and weights side by side are never taken apart.

    Args:
        step: the step's adapters.
        place: the group.
        x: [N, K] bfloat16, contiguous: the group's inputs.
        weights: of the base.
        y: [N, outputs side by side] bfloat16 or float32, contiguous: the outputs, biases included; updated.
        work: the workspace.
        products: of the base's linears.
    """
    start = 0
    for member, (name, size) in enumerate(zip(place.names, place.sizes, strict=True)):
        if name in step.acting.scaled:
            word = place.members + member * len(LinearWord) + LinearWord.INPUT
            for first in range(0, step.max_rows, SCALED_ROWS):
                _rescale(step, word, first, x, weights, y, (start, size), work, products)
        start += size


def _rescale(
    step: StepAdapters,
    word: int,
    first: int,
    x: Tensor,
    weights: CudaLinear,
    y: Tensor,
    columns: tuple[int, int],
    work: Workspace,
    products: LinearWorkspace,
) -> None:
    """Of rows from one place on, the outputs of the linear that has some columns."""
    num_rows, d_in, d_out = min(SCALED_ROWS, step.max_rows - first), x.shape[1], y.shape[1]
    start, size = columns
    scaled = work.scaled[: num_rows * d_in].view(num_rows, d_in)
    found = work.outputs.view(y.dtype)[: num_rows * d_out].view(num_rows, d_out)
    where = step.records.stride(0), word, first
    scaling.scaled_input[num_rows, -(-d_in // _TILE)](
        x, scaled, *step.of_rows, *where, d_in, BLOCK=_TILE, enable_fp_fusion=True
    )
    linear(scaled, weights, found, products)
    scaling.put_outputs[num_rows, -(-size // _TILE)](
        found, y, *step.of_rows, *where, d_out, start, size, BLOCK=_TILE, enable_fp_fusion=True
    )
