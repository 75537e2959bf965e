"""A training as a call: ``train`` one task, or ``train_several`` that take steps in turn on one base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.progress import Progress, no_progress
from manyhats.trainer.data.task_data import check_first_rows
from manyhats.trainer.errors import CheckpointError, SettingError
from manyhats.trainer.files.output_directory import check_output_directory, checkpoints_directory
from manyhats.trainer.report.events import Listener, all_of, ignore
from manyhats.trainer.report.report import TrainingReport
from manyhats.trainer.run.base import TrainingBase, load_base
from manyhats.trainer.run.checkpoint import newest_in
from manyhats.trainer.run.interrupt import StopRequest, TrainingInterrupted, keep
from manyhats.trainer.run.task import TaskTraining, open_task
from manyhats.trainer.run.training_run import TrainingRun
from manyhats.trainer.settings.settings import ModelSettings, TrainSettings


def train(
    settings: TrainSettings,
    model: LoadedModel | None = None,
    *,
    resume: bool = False,
    listener: Listener = ignore,
    progress: Progress = no_progress,
    home: Path | None = None,
) -> TrainingReport:
    """Train one task, and write its artifact, model card and report to ``settings.out``.

    Args:
        settings: all of the run's settings.
        model: the base, if already in memory, with the settings' quantization and dtype.
        resume: continue from the newest checkpoint in ``settings.out``.
        listener: receives its events.
        progress: receives the base's loading progress.
        home: where fetched models are kept; None for the default.

    Raises:
        TrainerError: something is wrong with the settings, the data, the run or the output.
        ModelError: the base cannot be loaded.
        EngineError: labels cannot be scored.
        TrainingInterrupted: by SIGINT or SIGTERM; there is a checkpoint to resume from. A command exits with 130.
    """
    with StopRequest().installed() as stop:
        if model is None:
            check_before_loading(settings, resume=resume)
        base = load_base(settings.model, model, progress=progress, home=home)
        with ExitStack() as opened:
            try:
                task = opened.enter_context(
                    open_task(settings, base, resume=resume, listener=all_of(listener, stop))
                )
            except KeyboardInterrupt as error:
                if stop.is_urgent:
                    raise
                raise TrainingInterrupted([]) from error
            take_turns([task.run], stop)
            return task.finish()


def take_turns(runs: Sequence[TrainingRun], stop: StopRequest) -> None:
    """Let each unfinished run take a step in turn, until all are done.

    Raises:
        DivergedError: from the first run that diverges.
        TrainingInterrupted: after a signal, or a ``KeyboardInterrupt`` from elsewhere; each unfinished run has a
            checkpoint.
        KeyboardInterrupt: after a second signal, at once.
    """
    try:
        while unfinished := [run for run in runs if not run.is_done]:
            for run in unfinished:
                stop.check(runs)
                run.step()
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt as error:
        if stop.is_urgent:
            raise
        raise TrainingInterrupted(keep(runs)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutcome:
    """How one of several tasks ended: with a report, or with an error."""

    settings: TrainSettings
    report: TrainingReport | None = None
    error: Exception | None = None


Told = Callable[[TaskOutcome], None]


def _ignore(outcome: TaskOutcome) -> None:
    """Does nothing."""


def train_several(
    tasks: Sequence[TrainSettings],
    model: LoadedModel | None = None,
    *,
    resume: bool = False,
    listener: Listener = ignore,
    on_outcome: Told = _ignore,
    progress: Progress = no_progress,
    home: Path | None = None,
) -> tuple[TaskOutcome, ...]:
    """Train tasks of any methods on one base, one step each in turn; each has the losses it would have alone.

    A task that fails, because of its data or a loss that is not finite, does not stop the others. Each task's artifact
    is written and evaluated right after its last step.

    Args:
        tasks: at least one, all on one base, each with its own ``out``.
        model: the base, if already in memory, with the settings' quantization and dtype.
        resume: continue from each task's newest checkpoint; a task without one begins.
        listener: receives the events of all of them.
        on_outcome: called when each task ends or fails.
        progress: receives the base's loading progress.
        home: where fetched models are kept; None for the default.

    Returns:
        The outcome of each task, in order.

    Raises:
        SettingError: the tasks do not share one base.
        ModelError: the base cannot be loaded.
        TrainingInterrupted: by SIGINT or SIGTERM; every unfinished task has a checkpoint to resume from.
    """
    with StopRequest().installed() as stop:
        base = load_base(common_base(tasks), model, progress=progress, home=home)
        told = all_of(listener, stop)
        with ExitStack() as opened:
            places = [_Place(settings, base, resume, told, on_outcome) for settings in tasks]
            for place in places:
                opened.callback(place.close)
            _take_turns(places, stop)
        return tuple(place.outcome for place in places if place.outcome is not None)


def common_base(tasks: Iterable[TrainSettings]) -> ModelSettings:
    """The base's settings, which all tasks must share.

    Raises:
        SettingError: they differ, or there are none.
    """
    bases = {settings.model: settings.task for settings in tasks}
    if not bases:
        raise SettingError("tasks", "there are none")
    first, *others = bases
    for other in others:
        raise SettingError("model", f"{bases[other]} and {bases[first]} do not have the same base")
    return first


class _Place:
    """One of several tasks: not yet open, running, or ended with an outcome."""

    def __init__(
        self, settings: TrainSettings, base: TrainingBase, resume: bool, listener: Listener, on_outcome: Told
    ) -> None:
        self.settings = settings
        self.outcome: TaskOutcome | None = None
        self._base = base
        self._resume = resume
        self._listener = listener
        self._on_outcome = on_outcome
        self._stack = ExitStack()
        self._task: TaskTraining | None = None

    @property
    def run(self) -> TrainingRun | None:
        """What an interrupt must keep; None before the task is opened and after it ends."""
        return None if self._task is None else self._task.run

    def open(self) -> None:
        """Read its data and make its adapter."""
        try:
            resume = self._resume and has_checkpoint(Path(self.settings.out))
            self._task = self._stack.enter_context(
                open_task(self.settings, self._base, resume=resume, listener=self._listener)
            )
        except Exception as error:  # noqa: BLE001 - whatever ends one task, the others go on
            self._end(TaskOutcome(settings=self.settings, error=error))

    def step(self) -> None:
        """Take a step; after the last one, finish."""
        if self._task is None:
            return
        try:
            if not self._task.run.is_done:
                self._task.run.step()
            if self._task.run.is_done:
                self._end(TaskOutcome(settings=self.settings, report=self._task.finish()))
        except Exception as error:  # noqa: BLE001 - whatever ends one task, the others go on
            self._end(TaskOutcome(settings=self.settings, error=error))

    def close(self) -> None:
        """Close what it holds open."""
        self._task = None
        self._stack.close()

    def _end(self, outcome: TaskOutcome) -> None:
        self.outcome = outcome
        self.close()
        self._on_outcome(outcome)


def _take_turns(places: Sequence[_Place], stop: StopRequest) -> None:
    """Open all tasks, then step each in turn until all have ended.

    Raises:
        TrainingInterrupted: after a signal; every task that has begun and not ended has a checkpoint.
        CheckpointError: after a signal, a checkpoint cannot be written.
        KeyboardInterrupt: after a second signal, at once.
    """
    try:
        for place in places:
            _stop_if_asked(stop)
            place.open()
        while unfinished := [place for place in places if place.outcome is None]:
            for place in unfinished:
                _stop_if_asked(stop)
                place.step()
    except KeyboardInterrupt as error:
        if stop.is_urgent:
            raise
        of_finished = error.checkpoints if isinstance(error, TrainingInterrupted) else ()
        raise TrainingInterrupted([*of_finished, *keep(_runs(places))]) from error


def _stop_if_asked(stop: StopRequest) -> None:
    """Raise ``KeyboardInterrupt`` after a signal."""
    if stop.is_set:
        raise KeyboardInterrupt


def _runs(places: Iterable[_Place]) -> list[TrainingRun]:
    return [place.run for place in places if place.run is not None]


def has_checkpoint(out: Path) -> bool:
    """Whether an output directory has a training run that can be resumed."""
    return newest_in(checkpoints_directory(out)) is not None


def check_before_loading(settings: TrainSettings, *, resume: bool = False) -> None:
    """Check the output directory, the artifact to start from, and the first row of each data source.

    Raises:
        SettingError: ``out`` or ``init_from``.
        CheckpointError: there is nothing to resume from.
        DataError: a source cannot be read, or its first row cannot be trained on.
    """
    if settings.out:
        out = Path(settings.out)
        check_output_directory(out)
        checkpoints = checkpoints_directory(out)
        if resume and newest_in(checkpoints) is None:
            raise CheckpointError(f"{checkpoints} has no checkpoint to resume from")
    if settings.init_from and not Path(settings.init_from).is_dir():
        raise SettingError("init_from", f"{settings.init_from}: is not a directory")
    data = settings.data
    check_first_rows(settings, [source for source in (data.train, data.eval) if source])
