"""An adapter in training: parameters, and the artifact they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.trainer.errors import CheckpointError


class TrainableAdapter(Protocol):
    """A trainable adapter. Its forward is the server's: ``lowered`` runs the method's own ``lower`` on its artifact."""

    @property
    def method(self) -> AdapterMethod:
        """As the artifact's."""
        ...

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The trained parameters, float32, by the names that checkpoints use."""
        ...

    @property
    def dropout(self) -> float:
        """Dropout of the input of low-rank deltas, while training."""
        ...

    def learning_rate_scale(self, name: str) -> float:
        """The factor on one parameter's learning rate; 1 except for LoRA+."""
        ...

    def artifact(self) -> AdapterArtifact:
        """The artifact as it stands: tensors by the names of its file, with gradient history."""
        ...

    def lowered(self) -> LoweredAdapter:
        """``artifact`` as primitives, differentiable with respect to ``parameters``."""
        ...

    def files(self, save_dtype: str) -> Mapping[str, bytes]:
        """The artifact's files by name, config and safetensors: matrices in ``save_dtype``, vectors in float32."""
        ...


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
