"""Heads of tasks that read a text instead of continuing it: what they take of its hidden rows, and make of that."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from manyhats.adapters.primitives import LayerNorm


class Pooling(Enum):
    """What a head reads of a text's hidden rows: the first or last, their mean or maximum, or every row by itself."""

    FIRST = "first"
    LAST = "last"
    MEAN = "mean"
    MAX = "max"
    ALL = "all"


class TaskKind(Enum):
    """What a task does with a text."""

    GENERATE = "generate"
    EMBED = "embed"
    CLASSIFY = "classify"
    CLASSIFY_TOKENS = "classify_tokens"
    SPAN = "span"


class ScoreActivation(Enum):
    """How logits become scores: over all labels together, each by itself, or not at all."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"


@dataclass(frozen=True, slots=True, eq=False)
class HeadLayer:
    """``y = norm(activation(x Wᵀ + b))``.

    Attributes:
        weight: [out, in], float32.
        bias: [out], float32, or None.
        activation: a name in ``manyhats.adapters.activations.ACTIVATIONS``, or None.
        norm: float32, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    norm: LayerNorm | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of its numbers."""
        parts = (self.weight, self.bias, *(() if self.norm is None else (self.norm.weight, self.norm.bias)))
        return tuple(part for part in parts if part is not None)


@dataclass(frozen=True, slots=True, eq=False)
class TaskHead:
    """A head on hidden rows.

    Attributes:
        kind: what the task does.
        pooling: what the first layer reads.
        layers: applied one after the other; none gives the pooled values themselves.
        labels: of the last layer's outputs, in their order; empty for an embedding.
        activation: from the last layer's outputs to scores.
        skipped_token_id: trailing tokens with this id do not count for ``LAST``; None for none.
    """

    kind: TaskKind
    pooling: Pooling
    layers: tuple[HeadLayer, ...]
    labels: tuple[str, ...] = ()
    activation: ScoreActivation = ScoreActivation.SOFTMAX
    skipped_token_id: int | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of its numbers."""
        return tuple(tensor for layer in self.layers for tensor in layer.tensors)

    @property
    def num_outputs(self) -> int:
        """How many values its last layer has; 0 without layers."""
        return int(self.layers[-1].weight.shape[0]) if self.layers else 0
