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
from manyhats.trainer.data.dataset import Dataset
from manyhats.trainer.data.head_data import HeadData, read_head_data
from manyhats.trainer.data.head_rows import ReadDataset
from manyhats.trainer.data.head_task import HeadTask
from manyhats.trainer.data.head_tokens import TextReading
from manyhats.trainer.data.task_data import TaskData, longest_row, read_task_data, with_text_of
from manyhats.trainer.errors import SettingError
from manyhats.trainer.files.output_directory import (
    make_output_directory,
    remove_if_empty,
    tensorboard_directory,
    write_artifact,
    write_report,
)
from manyhats.trainer.memory.peak import peak_memory
from manyhats.trainer.methods.adapter import num_trainable
from manyhats.trainer.methods.head import check_reads
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.methods.targets import with_named_modules
from manyhats.trainer.model.head_loss import HeadLoss
from manyhats.trainer.report.curves import loss_curve, tensorboard_curves
from manyhats.trainer.report.events import (
    DataRead,
    Listener,
    TokenizingProgress,
    all_of,
    ignore,
)
from manyhats.trainer.report.model_card import model_card
from manyhats.trainer.report.report import (
    ArtifactReport,
    BaseReport,
    DataReport,
    TrainingReport,
)
from manyhats.trainer.report.served import SavedAdapter, read_saved
from manyhats.trainer.run.base import TrainingBase, num_parameters
from manyhats.trainer.run.checkpoint import open_checkpoints, recorded_date
from manyhats.trainer.run.gradients import LossModel
from manyhats.trainer.run.interrupt import TrainingInterrupted
from manyhats.trainer.run.measuring import Measuring
from manyhats.trainer.run.state import RunResult
from manyhats.trainer.run.training_run import TrainingRun
from manyhats.trainer.settings.settings import TrainSettings, with_quantization

_TELL_EVERY_S = 0.2


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
        settings = with_quantization(settings, base.model.quantization)
        self._settings = settings
        self._out = Path(settings.out)
        self._base = base
        self._listener = listener
        check_reads(settings, base.model.description)
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
        measuring = Measuring(
            self._settings, self._base, self._model, self._losses, self._data, self._listener
        )
        evaluation = measuring.evaluation(result, saved)
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
