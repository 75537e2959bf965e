"""An adapter in training: parameters, and the artifact that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.primitives import LoweredAdapter


class TrainableAdapter(Protocol):
    """What is trained. Its forward is the server's: ``lowered`` runs the method's own ``lower`` on its artifact."""

    @property
    def method(self) -> AdapterMethod:
        """As the artifact's."""
        ...

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, float32, by a name that checkpoints keep."""
        ...

    @property
    def dropout(self) -> float:
        """Of the input of low-rank deltas, while training."""
        ...

    def learning_rate_scale(self, name: str) -> float:
        """Multiplies the learning rate of one parameter; 1 but for LoRA+."""
        ...

    def artifact(self) -> AdapterArtifact:
        """The artifact as it stands: tensors by the names of its file, with their gradients' history."""
        ...

    def lowered(self) -> LoweredAdapter:
        """``artifact`` as primitives, differentiable with respect to ``parameters``."""
        ...

    def files(self, save_dtype: str) -> Mapping[str, bytes]:
        """The artifact's files by name, config and safetensors: matrices in ``save_dtype``, vectors in float32."""
        ...
