"""``train``: one task, from its settings to the artifact."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.progress import Progress, no_progress
from manyhats.trainer.report.events import Listener, all_of, ignore
from manyhats.trainer.report.report import TrainingReport
from manyhats.trainer.run.base import load_base
from manyhats.trainer.run.interrupt import StopRequest, TrainingInterrupted, keep
from manyhats.trainer.run.preflight import check_before_loading
from manyhats.trainer.run.task import open_task
from manyhats.trainer.run.training_run import TrainingRun
from manyhats.trainer.settings.settings import TrainSettings


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
