"""What a training run reports while it runs: one frozen event at a time, to a listener."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manyhats.trainer.data.dataset import DataCounts
from manyhats.trainer.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizingProgress:
    """Data is being read and tokenized; this many rows and turns so far."""

    task: str
    done: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRead:
    """A source has been tokenized.

    Attributes:
        source: its name.
        is_held_out: whether it is for evaluation rather than training.
        num_rows: of tokens, which may be more than were read.
        counts: what happened to its rows.
    """

    task: str
    source: str
    is_held_out: bool
    num_rows: int
    counts: DataCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBegan:
    """A run is about to take its first step; ``step`` is above 0 if it resumes from a checkpoint."""

    task: str
    step: int
    num_steps: int
    num_trainable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step.

    Attributes:
        step: from 1.
        epoch: passes over the data so far, a fraction within one.
        loss: the mean over the step's targets, before its update; of tokens and classes a cross-entropy, in nats.
        learning_rate: of parameters whose scale is 1.
        grad_norm: of all gradients together, before clipping.
        num_tokens: in all its rows.
        num_targets: terms of the loss; how many of those are learned, if texts are continued.
        seconds: wall time.
    """

    task: str
    step: int
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_targets: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProgress:
    """For how many held-out rows the loss has been computed during an evaluation."""

    task: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """The held-out loss after a step: the mean over all target tokens; ``is_best`` if it is the lowest so far."""

    task: str
    step: int
    loss: float
    is_best: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReport:
    """A checkpoint was written."""

    task: str
    step: int
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed:
    """A checkpoint could not be written; training continues, and earlier checkpoints remain."""

    task: str
    step: int
    error: CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringProgress:
    """How many requests about held-out rows the engine has answered, with the base and the adapter together."""

    task: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """The run has ended; ``stopped_early`` if the held-out loss no longer fell."""

    task: str
    step: int
    stopped_early: bool


Event = (
    TokenizingProgress
    | DataRead
    | RunBegan
    | StepReport
    | EvaluationProgress
    | EvaluationReport
    | CheckpointReport
    | CheckpointFailed
    | ScoringProgress
    | RunEnded
)
Listener = Callable[[Event], None]
"""Called on the training thread; an exception from it ends the training run."""


def ignore(event: Event) -> None:
    """A listener that does nothing."""


def all_of(*listeners: Listener) -> Listener:
    """Call each listener in turn."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell
