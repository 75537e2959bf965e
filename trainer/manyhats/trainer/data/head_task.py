"""What a task's head is to learn, as settings and data say."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from manyhats.adapters.heads import Pooling, ScoreActivation, TaskKind
from manyhats.adapters.reserved_labels import ACTIVATION, CLASS, POOLING, numbered


class Loss(Enum):
    """What is minimized: of one class of several, of any number of classes, of a number, of vectors."""

    CROSS_ENTROPY = "cross_entropy"
    BINARY_CROSS_ENTROPY = "binary_cross_entropy"
    SQUARED_ERROR = "squared_error"
    CONTRASTIVE = "contrastive"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTask:
    """A task that reads texts.

    Attributes:
        kind: what it makes of a text.
        loss: see ``Loss``.
        classes: the names of the head's outputs, in order; empty if they are numbers or vectors.
        pooling: what makes a text's vector; None for the head's own.
        temperature: similarities of vectors are divided by it.
    """

    kind: TaskKind
    loss: Loss
    classes: tuple[str, ...] = ()
    pooling: Pooling | None = None
    temperature: float = 1.0

    @property
    def num_outputs(self) -> int:
        """Of the head; 0 if it has no layers."""
        return 0 if self.kind is TaskKind.EMBED else max(1, len(self.classes))

    @property
    def activation(self) -> ScoreActivation:
        """How its outputs become scores."""
        return {
            Loss.CROSS_ENTROPY: ScoreActivation.SOFTMAX,
            Loss.BINARY_CROSS_ENTROPY: ScoreActivation.SIGMOID,
        }.get(self.loss, ScoreActivation.NONE)

    @property
    def labels(self) -> dict[str, str]:
        """What a version's labels say of it: its outputs' names and how they are scored, or what makes vectors."""
        said = numbered(CLASS, self.classes)
        if self.loss is Loss.BINARY_CROSS_ENTROPY:
            said[ACTIVATION] = self.activation.value
        if self.pooling is not None:
            said[POOLING] = self.pooling.value
        return said
