"""What ``manyhats train`` does once its packages are installed: training, registration, and output."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from manyhats.adapters.errors import AdapterError
from manyhats.cli.options.connection import describe
from manyhats.cli.terminal.failures import CommandError, print_error
from manyhats.cli.terminal.interrupts import prompt_interrupts
from manyhats.cli.terminal.output import human_bytes, human_count, print_fields, print_json, to_plain
from manyhats.cli.terminal.progress import shown_progress
from manyhats.cli.training.server import Server
from manyhats.client import ManyhatsError, Registration
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.engine.errors import EngineError
from manyhats.trainer.errors import RegistrationError, TrainerError
from manyhats.trainer.files.output_directory import holds_artifact, report_file
from manyhats.trainer.model.computation import resolve_computation
from manyhats.trainer.registration import (
    ActivationRule,
    RegistrationServer,
    head_labels,
    version_labels,
    why_no_classes,
    why_no_names,
)
from manyhats.trainer.report.progress import shown_training
from manyhats.trainer.report.report import Evaluation, TrainingReport
from manyhats.trainer.settings.settings import ModelSettings, TrainSettings
from manyhats.trainer.train import TaskOutcome, check_before_loading, common_base, train, train_several


@dataclass(frozen=True, slots=True)
class Registrar:
    """Registers what was trained, if a server is given.

    Attributes:
        server: None registers nothing.
        activates: whether a registered version becomes the task's active one.
        rule: what its results must be for that; None for no condition.
    """

    server: RegistrationServer | None
    activates: bool = True
    rule: ActivationRule | None = None

    @classmethod
    def of(cls, flags: Server, tasks: Sequence[TrainSettings]) -> Registrar:
        """From the command's options, for the tasks to be trained.

        Raises:
            UsageError: the options contradict each other.
            SettingError: the condition is malformed, or a training will not have the results that it needs.
        """
        connection = flags.connection
        if connection is None:
            return cls(None)
        rule = None
        if flags.activate_if is not None:
            rule = ActivationRule.parse(flags.activate_if)
            for settings in tasks:
                rule.check(settings)
        server = RegistrationServer(
            target=connection.server, credentials=connection.credentials(), timeout_s=connection.timeout
        )
        return cls(server, not flags.no_activate, rule)

    def look(self) -> None:
        """Say at once if the server cannot be reached: the training may take hours."""
        if self.server is None:
            return
        try:
            self.server.info()
        except ManyhatsError as error:
            typer.echo(
                f"warning: unless this changes, the artifact will be kept but not registered: {describe(error)}",
                err=True,
            )

    def register(self, settings: TrainSettings, report: TrainingReport) -> Ended:
        """Make the artifact a version of the task, the active one if requested and its results are good enough.

        If the server refuses, that is the outcome's error.
        """
        unmet = self.rule.unmet(report.evaluation) if self.rule else ""
        if self.server is None:
            return Ended(settings=settings, report=report)
        try:
            registration = self.server.register(
                settings.task,
                Path(settings.out),
                activate=self.activates and not unmet,
                labels=_labels(report),
            )
        except RegistrationError as error:
            return Ended(settings=settings, report=report, error=error)
        if why := why_no_classes(report.evaluation) if report.head is None else why_no_names(report.head):
            typer.echo(f"note: {settings.task} is registered without classes: {why}", err=True)
        return Ended(settings=settings, report=report, registration=registration, unmet=unmet)


def _labels(report: TrainingReport) -> dict[str, str]:
    return version_labels(report.evaluation) if report.head is None else head_labels(report.head)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A task whose training is over.

    Attributes:
        error: of the training, or of the registration.
        unmet: why it was registered but not activated, if a condition was not met.
    """

    settings: TrainSettings
    report: TrainingReport | None
    registration: Registration | None = None
    unmet: str = ""
    error: Exception | None = None


def train_one(settings: TrainSettings, registrar: Registrar, resume: bool, as_json: bool) -> None:
    """Train one task, register it, and print its report.

    Raises:
        TrainerError, ModelError, EngineError: as ``train``; or the server refuses the artifact, which is kept.
        TrainingInterrupted: by a signal.
    """
    registrar.look()
    check_before_loading(settings, resume=resume)
    _tell_what_is_replaced([settings], resume)
    model = _load(settings.model)
    with shown_training() as listener:
        report = train(settings, model, resume=resume, listener=listener)
    ended = _registered(TaskOutcome(settings=settings, report=report), registrar)
    if as_json:
        print_json(_as_plain(ended))
    else:
        print_report(ended)
    if ended.error is not None:
        raise ended.error


def train_all(tasks: Sequence[TrainSettings], registrar: Registrar, resume: bool, as_json: bool) -> None:
    """Train tasks in turns, register each as soon as it is done, and print their reports.

    Raises:
        CommandError: a task failed; the others are done.
        SettingError, ModelError: as ``train_several``.
        TrainingInterrupted: by a signal.
    """
    registrar.look()
    _tell_what_is_replaced(tasks, resume)
    model = _load(common_base(tasks))
    all_ended: list[Ended] = []

    def note(outcome: TaskOutcome) -> None:
        ended = _registered(outcome, registrar)
        all_ended.append(ended)
        if ended.error is not None:
            print_error(f"{outcome.settings.task}: {_text(ended.error)}")

    with shown_training() as listener:
        train_several(tasks, model, resume=resume, listener=listener, on_outcome=note)
    if as_json:
        print_json({"tasks": [{"task": each.settings.task, **_as_plain(each)} for each in all_ended]})
    else:
        _print_reports(all_ended)
    failed = [each.settings.task for each in all_ended if each.error is not None]
    if failed:
        raise CommandError(f"{len(failed)} of {len(tasks)} tasks failed: {', '.join(failed)}")


def _tell_what_is_replaced(tasks: Sequence[TrainSettings], resume: bool) -> None:
    for settings in tasks:
        if not resume and holds_artifact(Path(settings.out)):
            typer.echo(f"{settings.task}: the artifact in {settings.out} will be replaced", err=True)


def _load(settings: ModelSettings) -> LoadedModel:
    """The base, as the training needs it; with progress bars, which must be gone before the training's."""
    computation = resolve_computation(settings)
    with prompt_interrupts(), shown_progress() as report:
        model = load_model(
            settings.model, quantization=settings.quantization, dtype=computation.dtype, progress=report
        )
    base = _base(settings.model, model.quantization)
    typer.echo(f"base: {base}, computed in {computation.dtype_name}", err=True)
    _tell_of_quantization(model)
    return model


def _tell_of_quantization(model: LoadedModel) -> None:
    """Say that what is trained is not what is served by default, if a server stores the base otherwise."""
    served = model.usual_quantization
    if model.quantization != served:
        form = {"nf4": "in NF4", "none": "dense"}
        typer.echo(
            f"note: the base is {form[model.quantization]}, but a server keeps this one {form[served]} unless told "
            f"otherwise: serve it with --quantization {model.quantization}, or train with --quantization {served}",
            err=True,
        )


def _registered(outcome: TaskOutcome, registrar: Registrar) -> Ended:
    settings, report = outcome.settings, outcome.report
    if report is None:
        return Ended(settings=settings, report=None, error=outcome.error)
    return registrar.register(settings, report)


def _text(error: Exception) -> str:
    """An intended error in its own words, any other with its type."""
    on_purpose = (TrainerError, EngineError, AdapterError, OSError)
    return (
        by_flags(str(error))
        if isinstance(error, on_purpose)
        else f"unexpected {type(error).__name__}: {error}"
    )


def by_flags(text: str) -> str:
    """An error's advice to set a setting, as advice to give its flag."""
    return re.sub(r"\bset `(\w+)`", lambda match: f"give --{match[1].replace('_', '-')}", text)


def _as_plain(ended: Ended) -> dict[str, Any]:
    """The report as in its file, and the registration's outcome."""
    report = None if ended.report is None else json.loads(ended.report.to_json())
    error = None if ended.error is None else _text(ended.error)
    return {
        "out": ended.settings.out,
        "report": report,
        "registration": to_plain(ended.registration),
        "not_activated": ended.unmet or None,
        "error": error,
    }


def _print_reports(all_ended: Sequence[Ended]) -> None:
    for ended in all_ended:
        if ended.report is not None:
            print_report(ended)


def print_report(ended: Ended) -> None:
    """What people want to know about a training; the rest is in the report's file."""
    report, settings = ended.report, ended.settings
    if report is None:
        return
    artifact, last = report.artifact, report.steps[-1]
    base = _base(settings.model.model, report.settings.model.quantization)
    print_fields(
        {
            "task": f"{settings.task} ({artifact.method.replace('_', ' ')}, on {base})",
            "artifact": f"{settings.out} ({human_bytes(artifact.num_bytes)}, {artifact.digest})",
            "steps": f"{len(report.steps)}{', stopped early' if report.stopped_early else ''}",
            "loss": f"{report.steps[0].loss:.4f} in the first step, {last.loss:.4f} in the last",
            "held out": "" if report.evaluation is None else _held_out(report.evaluation),
            "trained": f"{human_count(artifact.num_trainable)} parameters ({report.trainable_share:.2%})",
            "speed": f"{report.tokens_per_s:.0f} tokens/s",
            "peak memory": human_bytes(report.peak_memory.cuda or report.peak_memory.rss),
            "report": str(report_file(Path(settings.out))),
            "registered": "" if ended.registration is None else _registration(ended.registration),
            "not activated": ended.unmet,
        }
    )


def _base(name: str, quantization: str) -> str:
    """The base, and whether it is in 4 bits."""
    return name if quantization == "none" else f"{name} in {quantization}"


def _held_out(evaluation: Evaluation) -> str:
    """Before and after, of the loss and of what else is measured."""
    before, after = evaluation.before, evaluation.after
    text = f"loss {after.loss:.4f}" if before is None else f"loss {before.loss:.4f} to {after.loss:.4f}"
    earlier = {} if before is None else evaluation.metrics(before)
    for name, value in evaluation.metrics(after).items():
        text += f", {name} {earlier[name]:.1%} to {value:.1%}" if name in earlier else f", {name} {value:.1%}"
    return f"{text} ({evaluation.num_items} rows)"


def _registration(registration: Registration) -> str:
    info = registration.adapter
    return f"{info.name} ({info.state}, {info.digest})"
