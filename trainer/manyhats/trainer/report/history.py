"""The steps and evaluations of a run so far, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence

from manyhats.trainer.report.events import EvaluationReport, StepReport


class RunHistory:
    """Grows by one step or evaluation at a time; its state depends only on them.

    Args:
        steps: those before, in order.
        evaluations: the same.
    """

    def __init__(
        self, steps: Sequence[StepReport] = (), evaluations: Sequence[EvaluationReport] = ()
    ) -> None:
        self._steps = list(steps)
        self._evaluations = list(evaluations)

    @property
    def steps(self) -> tuple[StepReport, ...]:
        """All steps."""
        return tuple(self._steps)

    @property
    def evaluations(self) -> tuple[EvaluationReport, ...]:
        """All evaluations."""
        return tuple(self._evaluations)

    @property
    def num_steps(self) -> int:
        """The number of steps taken."""
        return len(self._steps)

    def add_step(self, step: StepReport) -> None:
        """Add the next step."""
        self._steps.append(step)

    def add_evaluation(self, evaluation: EvaluationReport) -> None:
        """Add the next evaluation."""
        self._evaluations.append(evaluation)

    @property
    def best(self) -> EvaluationReport | None:
        """The evaluation of the lowest loss, the first of equals; None before any."""
        return next((each for each in reversed(self._evaluations) if each.is_best), None)

    @property
    def is_at_best(self) -> bool:
        """Whether the latest step was evaluated and is the best so far."""
        return self.best is not None and self.best.step == self.num_steps

    @property
    def is_evaluated(self) -> bool:
        """Whether the latest step was evaluated."""
        return bool(self._evaluations) and self._evaluations[-1].step == self.num_steps

    def is_better(self, loss: float) -> bool:
        """Whether a held-out loss is lower than all before."""
        return self.best is None or loss < self.best.loss

    def has_no_better(self, patience: int) -> bool:
        """Whether the last ``patience`` evaluations brought no improvement; never if that is 0."""
        last = self._evaluations[-patience:] if patience else []
        return len(last) == patience > 0 and not any(each.is_best for each in last)
