"""How good an artifact is on the evaluation data, and the base without it: losses here, answers by the engine."""

from __future__ import annotations

from dataclasses import dataclass

from manyhats.adapters.heads import TaskKind
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.data.head_data import HeadData
from manyhats.trainer.data.sampler import TrainingRows
from manyhats.trainer.data.task_data import TaskData
from manyhats.trainer.report.events import EvaluationProgress, Listener, ScoringProgress
from manyhats.trainer.report.head_scoring import score_head
from manyhats.trainer.report.label_scoring import score_labels
from manyhats.trainer.report.report import Evaluation, HeldOut
from manyhats.trainer.report.served import SavedAdapter
from manyhats.trainer.run.base import TrainingBase
from manyhats.trainer.run.evaluation import held_out_loss, in_float32
from manyhats.trainer.run.gradients import LossModel
from manyhats.trainer.run.state import RunResult
from manyhats.trainer.settings.settings import TrainSettings


@dataclass(frozen=True, slots=True, eq=False)
class Measuring:
    """What it takes to measure one task.

    Attributes:
        settings: the task's.
        base: what it was trained on.
        model: the base as the task's texts have it.
        losses: of its rows.
        data: its rows.
        listener: receives events.
    """

    settings: TrainSettings
    base: TrainingBase
    model: LoadedModel
    losses: LossModel
    data: TaskData | HeadData
    listener: Listener

    def evaluation(self, result: RunResult, saved: SavedAdapter) -> Evaluation | None:
        """The results of the base and of the artifact; None without evaluation data.

        Args:
            result: of the run.
            saved: the artifact it ended with.

        Raises:
            EngineError: the engine cannot answer.
        """
        if self.data.held_out is None:
            return None
        if isinstance(self.data, HeadData):
            return self._of_head(self.data, result, saved)
        return self._of_labels(self.data, result, saved)

    def _of_head(self, data: HeadData, result: RunResult, saved: SavedAdapter) -> Evaluation:
        assert data.held_out is not None
        rows = data.held_out.rows
        before, after = score_head(
            self.model,
            saved,
            data.task,
            data.held_out,
            dtype=self.base.computation.dtype_name,
            num_threads=self.settings.model.num_threads,
            on_progress=self._tell_scoring,
        )
        # Without its head the base tells no classes.
        has_before = data.task.kind is TaskKind.EMBED
        return Evaluation(
            num_items=len(rows),
            labels=(),
            before=HeldOut(loss=self._loss(rows, None), metrics=before or {}) if has_before else None,
            after=HeldOut(loss=self._loss_after(rows, result, saved), metrics=after),
        )

    def _of_labels(self, data: TaskData, result: RunResult, saved: SavedAdapter) -> Evaluation:
        assert data.held_out is not None
        rows = data.held_out.rows
        loss_before, loss_after = self._loss(rows, None), self._loss_after(rows, result, saved)
        before, after = self._num_right(saved, data)
        return Evaluation(
            num_items=len(rows),
            labels=data.labels,
            before=HeldOut(loss=loss_before, num_right=before),
            after=HeldOut(loss=loss_after, num_right=after),
            label_tokens=max(
                (len(label.token_ids) for item in data.items for label in item.labels), default=0
            ),
            form=data.held_out.form,
        )

    def _loss(self, rows: TrainingRows, adapter: LoweredAdapter | None) -> float:
        return held_out_loss(self.losses, adapter, rows, self.settings.optimization, self._tell_evaluation)

    def _loss_after(self, rows: TrainingRows, result: RunResult, saved: SavedAdapter) -> float:
        """That of the artifact; a float32 file has exactly the parameters that were evaluated last."""
        if self.settings.save_dtype == "float32":
            losses = {evaluation.step: evaluation.loss for evaluation in result.evaluations}
            return losses[result.artifact_step]
        return self._loss(rows, in_float32(saved.lowered, self.base.computation.device))

    def _num_right(self, saved: SavedAdapter, data: TaskData) -> tuple[int | None, int | None]:
        """How many labels the base and the artifact predict correctly."""
        if not data.items:
            return None, None

        scores = score_labels(
            self.model,
            saved,
            data.items,
            dtype=self.base.computation.dtype_name,
            num_threads=self.settings.model.num_threads,
            on_progress=self._tell_scoring,
        )
        right = [data.labels.index(item.label) for item in data.items]

        def count(predicted: tuple[int, ...]) -> int:
            return sum(a == b for a, b in zip(predicted, right, strict=True))

        return count(scores.base), count(scores.adapter)

    def _tell_scoring(self, done: int, total: int) -> None:
        self.listener(ScoringProgress(task=self.settings.task, done=done, total=total))

    def _tell_evaluation(self, done: int, total: int) -> None:
        self.listener(EvaluationProgress(task=self.settings.task, done=done, total=total))
