"""One task's training, step by step, so that several can take turns on one base."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from manyhats.trainer.data.head_data import HeadData
from manyhats.trainer.data.sampler import BatchSampler
from manyhats.trainer.data.task_data import TaskData
from manyhats.trainer.errors import CheckpointError, DivergedError, SettingError
from manyhats.trainer.methods.adapter import (
    TrainableAdapter,
    copied_parameters,
    num_trainable,
    set_parameters,
)
from manyhats.trainer.methods.making import default_learning_rate
from manyhats.trainer.report.events import (
    CheckpointFailed,
    CheckpointReport,
    EvaluationProgress,
    EvaluationReport,
    Listener,
    RunBegan,
    RunEnded,
    StepReport,
    ignore,
)
from manyhats.trainer.run.checkpoint import Checkpoints
from manyhats.trainer.run.evaluation import held_out_loss
from manyhats.trainer.run.gradients import LossModel, StepLoss, accumulate_gradients, step_randomness
from manyhats.trainer.run.optimizer import AdapterOptimizer, learning_rate_factor
from manyhats.trainer.run.state import RunHistory, RunResult, RunState
from manyhats.trainer.settings.settings import TrainSettings


class TrainingRun:
    """Trains one adapter, ``step`` by ``step``.

    A run depends only on its settings and data: other runs may take steps in between, and a resumed run has the losses
    of one that was never interrupted.

    Args:
        settings: of the task.
        decoder: the base, or what it computes the loss of a head with; it may be shared.
        adapter: what is trained.
        data: at least one row to train on; the loss is evaluated on those held out, if there are any.
        listener: receives its events.
        checkpoints: of this run; None writes none.

    Raises:
        SettingError: the optimizer cannot be used, or there is no evaluation data for early stopping.
    """

    def __init__(
        self,
        settings: TrainSettings,
        decoder: LossModel,
        adapter: TrainableAdapter,
        data: TaskData | HeadData,
        *,
        listener: Listener = ignore,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        options = settings.optimization
        if options.patience and data.held_out is None:
            raise SettingError("patience", "early stopping needs evaluation data (eval)")
        self._settings = settings
        self._options = options
        self._decoder = decoder
        self._adapter = adapter
        self._held_out = data.held_out
        self._listener = listener
        self._sampler = BatchSampler(data.train.rows, options, shuffle=settings.data.shuffle)
        self._learning_rate = options.learning_rate or default_learning_rate(settings.adapter)
        self._optimizer = AdapterOptimizer(adapter, options, self._learning_rate)
        self._checkpoints = checkpoints
        self._history = RunHistory()
        self._best: dict[str, Tensor] = {}
        self._failures: list[str] = []
        self._is_whole = True
        self._has_begun = False

    # State

    @property
    def task(self) -> str:
        """The task's name."""
        return self._settings.task

    @property
    def num_steps(self) -> int:
        """The number of steps of the whole run, unless it stops early."""
        return self._sampler.num_steps

    @property
    def num_steps_taken(self) -> int:
        """The number of steps so far."""
        return self._history.num_steps

    @property
    def newest_checkpoint(self) -> Path | None:
        """The checkpoint to resume from; None if there is none."""
        return None if self._checkpoints is None else self._checkpoints.newest()

    @property
    def is_done(self) -> bool:
        """Whether no steps are left, and the last one was evaluated."""
        return (self.num_steps_taken >= self.num_steps or self.stopped_early) and not self._owes_evaluation

    @property
    def stopped_early(self) -> bool:
        """Whether steps are left, but the last ``patience`` evaluations brought no improvement."""
        return self.num_steps_taken < self.num_steps and self._history.has_no_better(self._options.patience)

    # Steps

    def step(self) -> StepReport:
        """Take one optimizer step, then any evaluation and checkpoint that are due.

        Raises:
            DivergedError: its loss or gradient is not finite; the parameters are unchanged.
        """
        self.begin()
        began_s = time.perf_counter()
        index = self.num_steps_taken
        with step_randomness(self._options.seed, index, self._device):
            loss = accumulate_gradients(self._decoder, self._adapter, self._sampler.step(index))
        grad_norm = self._optimizer.clip()
        if not (math.isfinite(loss.loss) and math.isfinite(grad_norm)):
            self._optimizer.clear()
            raise self._diverged(index + 1)
        report = self._move(loss, grad_norm, began_s)
        self._listener(report)
        self._settle()
        return report

    def begin(self) -> None:
        """Tell the listener that the first step comes next; ``step`` does so if nobody has."""
        if not self._has_begun:
            self._has_begun = True
            self._listener(
                RunBegan(
                    task=self.task,
                    step=self.num_steps_taken,
                    num_steps=self.num_steps,
                    num_trainable=num_trainable(self._adapter),
                )
            )

    def _move(self, loss: StepLoss, grad_norm: float, began_s: float) -> StepReport:
        """Update the parameters and record the step; an interrupt in between leaves a run that cannot be saved."""
        index = self.num_steps_taken
        factor = learning_rate_factor(self._options, index, self.num_steps)
        self._is_whole = False
        self._optimizer.step(factor)
        report = StepReport(
            task=self.task,
            step=index + 1,
            num_steps=self.num_steps,
            epoch=self._sampler.epochs_after(index),
            loss=loss.loss,
            learning_rate=self._learning_rate * factor,
            grad_norm=grad_norm,
            num_tokens=loss.num_tokens,
            num_targets=loss.num_targets,
            seconds=time.perf_counter() - began_s,
        )
        self._history.add_step(report)
        self._is_whole = True
        self._optimizer.clear()
        return report

    def _settle(self) -> None:
        """Do what is due after a step."""
        if self._owes_evaluation:
            self.evaluate()
        self._write_checkpoint_if_due()
        if self.is_done:
            self._listener(
                RunEnded(task=self.task, step=self.num_steps_taken, stopped_early=self.stopped_early)
            )

    def _diverged(self, step: int) -> DivergedError:
        return DivergedError(step, self.newest_checkpoint)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._adapter.parameters.values())).device

    # Evaluation

    def evaluate(self) -> float:
        """The held-out loss with the current parameters: the mean over all target tokens, without dropout.

        Raises:
            SettingError: there is no evaluation data.
            DivergedError: it is not finite.
        """
        if self._held_out is None:
            raise SettingError("eval", "there is no evaluation data")
        began_s = time.perf_counter()
        loss = held_out_loss(
            self._decoder,
            self._adapter.lowered(),
            self._held_out.rows,
            self._options,
            self._tell_evaluation_progress,
        )
        if not math.isfinite(loss):
            raise self._diverged(self.num_steps_taken)
        report = EvaluationReport(
            task=self.task,
            step=self.num_steps_taken,
            loss=loss,
            is_best=self._history.is_better(loss),
            seconds=time.perf_counter() - began_s,
        )
        if report.is_best and self._options.patience:
            self._best = copied_parameters(self._adapter)
        self._history.add_evaluation(report)
        self._listener(report)
        return loss

    @property
    def _owes_evaluation(self) -> bool:
        """Whether the latest step is due for evaluation but was not evaluated."""
        step, every = self.num_steps_taken, self._options.eval_steps
        if self._held_out is None or step == 0 or self._history.is_evaluated:
            return False
        is_due = step % every == 0 if every else self._sampler.ends_epoch(step - 1)
        return is_due or step == self.num_steps

    def _tell_evaluation_progress(self, done: int, total: int) -> None:
        self._listener(EvaluationProgress(task=self.task, done=done, total=total))

    # Checkpoints

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of the current state.

        Raises:
            CheckpointError: it cannot be written, there is no output directory, or a step was interrupted halfway.
        """
        if self._checkpoints is None:
            raise CheckpointError("there is no output directory for checkpoints")
        if not self._is_whole:
            raise CheckpointError("the run was interrupted during an update of its parameters")
        best = self._history.best
        path = self._checkpoints.write(self._state(), None if best is None else best.step)
        self._listener(CheckpointReport(task=self.task, step=self.num_steps_taken, path=path))
        return path

    def restore_checkpoint(self) -> None:
        """Continue from the newest checkpoint in the output directory.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of a run with other settings or data.
        """
        if self._checkpoints is None:
            raise CheckpointError("there is no output directory to resume from")
        state = self._checkpoints.read_newest()
        set_parameters(self._adapter, state.parameters)
        self._optimizer.restore(state.optimizer)
        self._best = dict(state.best)
        self._history = RunHistory(state.steps, state.evaluations)
        if self._owes_evaluation:  # the interrupt came in between
            self._settle()

    def clear_checkpoints(self) -> None:
        """Remove the checkpoints of a finished run to make room for this run's.

        Raises:
            CheckpointError: they are of an unfinished run.
        """
        if self._checkpoints is not None:
            self._checkpoints.clear()

    def _write_checkpoint_if_due(self) -> None:
        every, step = self._options.checkpoint_steps, self.num_steps_taken
        is_due = bool(every) and (step % every == 0 or self._history.is_at_best)
        if self._checkpoints is None or not (is_due or self.is_done):
            return
        try:
            self.save_checkpoint()
        except CheckpointError as error:
            # What was learned is still in memory, and the next checkpoint may succeed.
            self._failures.append(str(error))
            self._listener(CheckpointFailed(task=self.task, step=step, error=error))

    def _state(self) -> RunState:
        return RunState(
            parameters=copied_parameters(self._adapter),
            optimizer=self._optimizer.state(),
            best=self._best,
            steps=self._history.steps,
            evaluations=self._history.evaluations,
            is_done=self.is_done,
        )

    # The end

    def finish(self) -> RunResult:
        """The run's result; with early stopping, the parameters are now those of the best evaluation.

        The run must not be used afterwards.
        """
        self.begin()
        best = self._history.best
        artifact_step = self.num_steps_taken
        if self._best and best is not None:
            set_parameters(self._adapter, self._best)
            artifact_step = best.step
        return RunResult(
            steps=self._history.steps,
            evaluations=self._history.evaluations,
            artifact_step=artifact_step,
            stopped_early=self.stopped_early,
            learning_rate=self._learning_rate,
            failures=tuple(self._failures),
        )
