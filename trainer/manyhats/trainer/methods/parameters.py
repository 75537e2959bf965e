"""An adapter's parameters, copied out and restored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manyhats.trainer.errors import CheckpointError
from manyhats.trainer.methods.adapter import TrainableAdapter


def copied_parameters(adapter: TrainableAdapter) -> dict[str, Tensor]:
    """A copy of the parameters by name, in host memory."""
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in adapter.parameters.items()
    }


@torch.no_grad()
def set_parameters(adapter: TrainableAdapter, values: Mapping[str, Tensor]) -> None:
    """Restore all parameters from what ``copied_parameters`` returned.

    Raises:
        CheckpointError: names or shapes are another adapter's.
    """
    parameters = adapter.parameters
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    if shapes != {name: value.shape for name, value in values.items()}:
        raise CheckpointError("the checkpoint's parameters do not match this adapter")
    for name, value in values.items():
        parameters[name].copy_(value)


def num_trainable(adapter: TrainableAdapter) -> int:
    """The number of trained values."""
    return sum(parameter.numel() for parameter in adapter.parameters.values())
