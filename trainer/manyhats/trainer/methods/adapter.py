"""An adapter in training: parameters, and the artifact they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.primitives import LoweredAdapter


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
