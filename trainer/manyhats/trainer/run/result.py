"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass

from manyhats.trainer.report.events import EvaluationReport, StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Everything a run did.

    Attributes:
        artifact_step: the step whose parameters the adapter has now.
        stopped_early: whether it ended because the held-out loss no longer fell.
        learning_rate: the peak.
        failures: checkpoints that could not be written.
    """

    steps: tuple[StepReport, ...]
    evaluations: tuple[EvaluationReport, ...]
    artifact_step: int
    stopped_early: bool
    learning_rate: float
    failures: tuple[str, ...]
