"""A group of linears with the rows' adapters: what acts there, in its order."""

from __future__ import annotations

from torch import Tensor

from manyhats.engine.backends.cuda.adapters.deltas import change_outputs, scale_inputs
from manyhats.engine.backends.cuda.adapters.gates import find_gates
from manyhats.engine.backends.cuda.adapters.layout import GroupPlace
from manyhats.engine.backends.cuda.adapters.scaling import rescale_members
from manyhats.engine.backends.cuda.adapters.step import StepAdapters, Workspace
from manyhats.engine.backends.cuda.attention.attend import PrefixGates
from manyhats.engine.backends.cuda.linears.linear import CudaLinear, LinearWorkspace, linear


def run_group(
    step: StepAdapters,
    place: GroupPlace,
    x: Tensor,
    weights: CudaLinear,
    y: Tensor,
    products: LinearWorkspace,
    work: Workspace,
) -> PrefixGates | None:
    """Launch a group's linears, each row's as its adapter has them.

    Args:
        step: the step's adapters.
        place: the group.
        x: [N, K] bfloat16, contiguous: the inputs, which adapters may rescale in place.
        weights: of the base, side by side.
        y: [N, outputs side by side] bfloat16 or float32, contiguous; written.
        products: for the base's linears.
        work: of adapters.

    Returns:
        Of the attention's group, the gates of KV prefixes; None if there are none.
    """
    gates = find_gates(step, place, x, work)
    scale_inputs(step, place, x)
    linear(x, weights, y, products)
    rescale_members(step, place, x, weights, y, work, products)
    change_outputs(step, place, x, y, work)
    return gates
