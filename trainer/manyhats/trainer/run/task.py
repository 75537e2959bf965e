"""One task from its settings to its artifact and report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from manyhats.adapters.formats.adapterhub.format import is_adapterhub
from manyhats.adapters.heads import TaskKind
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.data.dataset import Dataset
from manyhats.trainer.data.head_data import HeadData, read_head_data
from manyhats.trainer.data.head_rows import ReadDataset
from manyhats.trainer.data.head_task import HeadTask
from manyhats.trainer.data.head_tokens import TextReading
from manyhats.trainer.data.task_data import TaskData, longest_row, read_task_data, with_text_of
from manyhats.trainer.errors import BaseError, SettingError
from manyhats.trainer.files.output_directory import (
    make_output_directory,
    remove_if_empty,
    tensorboard_directory,
    write_artifact,
    write_report,
)
from manyhats.trainer.memory.peak import peak_memory
from manyhats.trainer.methods.adapter import num_trainable
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.methods.targets import with_named_modules
from manyhats.trainer.model.head_loss import HeadLoss
from manyhats.trainer.report.curves import loss_curve, tensorboard_curves
from manyhats.trainer.report.events import (
    DataRead,
    EvaluationProgress,
    Listener,
    ScoringProgress,
    TokenizingProgress,
    all_of,
    ignore,
)
from manyhats.trainer.report.head_scoring import score_head
from manyhats.trainer.report.label_scoring import score_labels
from manyhats.trainer.report.metrics import Metrics
from manyhats.trainer.report.model_card import model_card
from manyhats.trainer.report.report import (
    ArtifactReport,
    BaseReport,
    DataReport,
    Evaluation,
    HeldOut,
    TrainingReport,
)
from manyhats.trainer.report.served import SavedAdapter, read_saved
from manyhats.trainer.run.base import TrainingBase, num_parameters
from manyhats.trainer.run.checkpoint import open_checkpoints, recorded_date
from manyhats.trainer.run.evaluation import held_out_loss, in_float32
from manyhats.trainer.run.gradients import LossModel
from manyhats.trainer.run.interrupt import TrainingInterrupted
from manyhats.trainer.run.state import RunResult
from manyhats.trainer.run.training_run import TrainingRun
from manyhats.trainer.settings.settings import TrainSettings

_TELL_EVERY_S = 0.2


def check_reads(settings: TrainSettings, model: LoadedModel) -> None:
    """Check that the base can do what the task is to do.

    Raises:
        BaseError: it is an encoder, which continues no text.
    """
    if not settings.head.reads and model.architecture.head is None:
        raise BaseError(
            f"{model.architecture.model_type} is an encoder, which continues no text: set `head` to classification, "
            "tokens or embedding"
        )


def _data_report(dataset: Dataset | ReadDataset) -> DataReport:
    return DataReport(num_rows=len(dataset.rows), counts=dataset.counts)


@contextmanager
def open_task(
    settings: TrainSettings, base: TrainingBase, *, resume: bool = False, listener: Listener = ignore
) -> Iterator[TaskTraining]:
    """A task ready for its first or next step; while open, it writes curves to TensorBoard, if installed.

    Args:
        settings: ``out`` must be given.
        base: shared with other tasks.
        resume: continue from the newest checkpoint in ``out``.
        listener: receives its events.

    Raises:
        SettingError, DataError, BaseError: it cannot be trained as requested.
        CheckpointError: there is nothing to resume from; or, without ``resume``, there is an unfinished training run in
            ``out``.
        OutputError: ``out`` cannot be written.
    """
    if not settings.out:
        raise SettingError("out", "must name a directory")
    out = Path(settings.out)
    make_output_directory(out)
    with tensorboard_curves(tensorboard_directory(out)) as curves:
        try:
            task = TaskTraining(settings, base, resume=resume, listener=all_of(listener, curves))
        except BaseException:
            remove_if_empty(out)
            raise
        yield task


class TaskTraining:
    """A task's data, adapter and run; made by ``open_task``."""

    def __init__(
        self, settings: TrainSettings, base: TrainingBase, *, resume: bool, listener: Listener
    ) -> None:
        settings = replace(settings, adapter=with_named_modules(settings.adapter, base.model.description))
        self._settings = settings
        self._out = Path(settings.out)
        self._base = base
        self._listener = listener
        check_reads(settings, base.model)
        self._adapter = self._made()
        self._model, self._text_files = with_text_of(base.model, settings.init_from)
        self._date = (recorded_date(self._out) if resume else None) or datetime.now()
        self._data = self._read_data()
        self._tell_of_data()
        self._losses: LossModel = base.decoder
        made_with = {"base": base.model.description.digest, "model.dtype": base.computation.dtype_name}
        if isinstance(self._data, HeadData):
            self._adapter = self._made(self._data.task)
            self._losses = HeadLoss(base.decoder, self._data.task)
            made_with["classes"] = json.dumps(self._data.task.classes)
        self.run = TrainingRun(
            settings,
            self._losses,
            self._adapter,
            self._data,
            listener=listener,
            checkpoints=open_checkpoints(settings, self._data, made_with, self._date),
        )
        if resume:
            self.run.restore_checkpoint()
        else:
            self.run.clear_checkpoints()

    def _made(self, head: HeadTask | None = None) -> ParametrizedAdapter:
        """The adapter before its first step. One with a head is made twice: its data say what the head is to tell."""
        settings = self._settings
        starts_from = settings.init_from if head is not None or not settings.head.reads else ""
        return make_adapter(
            settings.adapter,
            settings.task,
            self._base.model,
            seed=settings.optimization.seed,
            head=head,
            init_from=starts_from,
            device=self._base.computation.device,
        )

    def _read_data(self) -> TaskData | HeadData:
        """The data; virtual tokens leave less of the base's context for its rows."""
        settings, model = self._settings, self._model
        prefix = self._adapter.lowered().prefix
        num_virtual_tokens = 0 if prefix is None else prefix.num_virtual_tokens
        on_row = self._progress_of_reading()
        if not settings.head.reads:
            return read_task_data(settings.data, model, num_virtual_tokens, now=self._date, on_row=on_row)
        reading = TextReading(
            tokenizer=model.tokenizer,
            head=settings.head.kind,
            settings=settings.data,
            max_length=longest_row(settings.data, model.architecture.max_context_length - num_virtual_tokens),
            vocab_size=model.architecture.vocab_size,
            padding_id=model.padding_id,
            on_row=on_row,
        )
        return read_head_data(settings.head, reading, model.description.pooling)

    def _progress_of_reading(self) -> Callable[[], None]:
        """Report to the listener a few times a second."""
        done, told_s = 0, 0.0

        def tell() -> None:
            nonlocal done, told_s
            done += 1
            now_s = time.monotonic()
            if now_s - told_s >= _TELL_EVERY_S:
                told_s = now_s
                self._listener(TokenizingProgress(task=self._settings.task, done=done))

        return tell

    def _tell_of_data(self) -> None:
        for is_held_out, dataset in ((False, self._data.train), (True, self._data.held_out)):
            if dataset is not None:
                self._listener(
                    DataRead(
                        task=self._settings.task,
                        source=dataset.source,
                        is_held_out=is_held_out,
                        num_rows=len(dataset.rows),
                        counts=dataset.counts,
                    )
                )

    def finish(self) -> TrainingReport:
        """After the last step: write the artifact, evaluate what was written, and write the report.

        Raises:
            OutputError: a file cannot be written, or a server would refuse the artifact.
            BaseError: the base was changed.
            EngineError: the labels cannot be scored.
            TrainingInterrupted: the listener raised ``KeyboardInterrupt``; the artifact is written, and resuming makes
                the report.
        """
        try:
            return self._finish()
        except KeyboardInterrupt as error:
            newest = self.run.newest_checkpoint
            raise TrainingInterrupted([] if newest is None else [newest]) from error

    def _finish(self) -> TrainingReport:
        peak = peak_memory()
        result = self.run.finish()
        files = {**self._adapter.files(self._settings.save_dtype), **self._text_files}
        write_artifact(self._out, files)
        saved = read_saved(self._settings.task, self._out, self._base.model.description)
        evaluation = self._evaluation(result, saved)
        report = TrainingReport(
            settings=self._settings,
            base=self._base_report(),
            artifact=self._artifact_report(result, saved, files),
            date=self._date,
            head=self._data.task if isinstance(self._data, HeadData) else None,
            train=_data_report(self._data.train),
            held_out=None if self._data.held_out is None else _data_report(self._data.held_out),
            steps=result.steps,
            evaluations=result.evaluations,
            evaluation=evaluation,
            stopped_early=result.stopped_early,
            peak_memory=peak,
            failures=result.failures,
        )
        self._write(report)
        return report

    def _write(self, report: TrainingReport) -> None:
        evaluation = report.evaluation
        before = None if evaluation is None or evaluation.before is None else evaluation.before.loss
        title = f"{self._settings.task} ({report.artifact.method.replace('_', ' ')})"
        curve = loss_curve(title, report.steps, report.evaluations, before)
        write_report(self._out, report.to_json(), curve, model_card(report))

    def _evaluation(self, result: RunResult, saved: SavedAdapter) -> Evaluation | None:
        """The base's results, and the artifact's."""
        held_out, options = self._data.held_out, self._settings.optimization
        if held_out is None:
            return None
        rows = held_out.rows

        def loss_of(adapter: LoweredAdapter | None) -> float:
            return held_out_loss(self._losses, adapter, rows, options, self._tell_evaluation)

        losses = {evaluation.step: evaluation.loss for evaluation in result.evaluations}
        # A float32 file has exactly the parameters that were evaluated last.
        is_exact = self._settings.save_dtype == "float32"
        # Without its head the base tells no classes.
        loss_before = None if self._tells_classes else loss_of(None)
        loss_after = (
            losses[result.artifact_step]
            if is_exact
            else loss_of(in_float32(saved.lowered, self._base.computation.device))
        )
        if isinstance(self._data, HeadData):
            before, after = self._head_metrics(saved, self._data)
            return Evaluation(
                num_items=len(rows),
                labels=(),
                before=None if loss_before is None else HeldOut(loss=loss_before, metrics=before or {}),
                after=HeldOut(loss=loss_after, metrics=after),
            )
        num_right = self._num_right(saved, self._data)
        assert loss_before is not None
        return Evaluation(
            num_items=len(rows),
            labels=self._data.labels,
            before=HeldOut(loss=loss_before, num_right=num_right[0]),
            after=HeldOut(loss=loss_after, num_right=num_right[1]),
            label_tokens=max(
                (len(label.token_ids) for item in self._data.items for label in item.labels), default=0
            ),
            form=None if self._data.held_out is None else self._data.held_out.form,
        )

    @property
    def _tells_classes(self) -> bool:
        return isinstance(self._data, HeadData) and self._data.task.kind is not TaskKind.EMBED

    def _head_metrics(self, saved: SavedAdapter, data: HeadData) -> tuple[Metrics | None, Metrics]:
        """How good the base and the artifact are, as served."""
        assert data.held_out is not None
        return score_head(
            self._model,
            saved,
            data.task,
            data.held_out,
            dtype=self._base.computation.dtype_name,
            num_threads=self._settings.model.num_threads,
            on_progress=self._tell_scoring,
        )

    def _tell_scoring(self, done: int, total: int) -> None:
        self._listener(ScoringProgress(task=self._settings.task, done=done, total=total))

    def _tell_evaluation(self, done: int, total: int) -> None:
        self._listener(EvaluationProgress(task=self._settings.task, done=done, total=total))

    def _num_right(self, saved: SavedAdapter, data: TaskData) -> tuple[int | None, int | None]:
        """How many labels the base and the artifact predict correctly."""
        if not data.items:
            return None, None

        scores = score_labels(
            self._model,
            saved,
            data.items,
            dtype=self._base.computation.dtype_name,
            num_threads=self._settings.model.num_threads,
            on_progress=self._tell_scoring,
        )
        right = [data.labels.index(item.label) for item in data.items]

        def count(predicted: tuple[int, ...]) -> int:
            return sum(a == b for a, b in zip(predicted, right, strict=True))

        return count(scores.base), count(scores.adapter)

    def _base_report(self) -> BaseReport:
        model = self._base.model
        return BaseReport(
            name=self._adapter.artifact().base_model or model.name,
            digest=model.description.digest,
            digest_before=self._base.digest,
            digest_after=self._base.check_unchanged(),
            num_parameters=num_parameters(model.weights),
            linear_bytes=self._base.decoder.linear_bytes,
            dtype=self._base.computation.dtype_name,
            device=self._base.computation.device.type,
        )

    def _artifact_report(
        self, result: RunResult, saved: SavedAdapter, files: Mapping[str, bytes]
    ) -> ArtifactReport:
        return ArtifactReport(
            digest=saved.record.digest,
            method=saved.record.method.value,
            library="adapter-transformers" if is_adapterhub(self._adapter.config) else "peft",
            files={
                name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()
            },
            num_parameters=saved.record.num_parameters,
            num_trainable=num_trainable(self._adapter),
            step=result.artifact_step,
            learning_rate=result.learning_rate,
        )
