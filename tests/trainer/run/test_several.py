"""Several tasks on one base: the same losses as alone, and failures, interrupts and ends of one that stay its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from manyhats.trainer.errors import DataError, DivergedError, SettingError
from manyhats.trainer.report.events import CheckpointReport, EvaluationProgress, Event, Listener, StepReport
from manyhats.trainer.report.report import TrainingReport
from manyhats.trainer.run.interrupt import TrainingInterrupted
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
)
from manyhats.trainer.settings.settings import TrainSettings
from manyhats.trainer.train import TaskOutcome, common_base, has_checkpoint, train, train_several
from support.factories.training_tasks import TinyTask, make_tiny_task

METHODS: dict[str, AdapterSettings] = {
    "lora": LoraSettings(rank=4, dropout=0.2),
    "bottleneck": BottleneckSettings(),
    "prefix": PrefixSettings(num_virtual_tokens=4, projection_size=8),
    "prompt": PromptSettings(num_virtual_tokens=4),
}


@pytest.fixture
def tiny(tmp_path: Path) -> TinyTask:
    return make_tiny_task(tmp_path / "data")


def interrupting(when: Callable[[Event], bool]) -> Listener:
    """Interrupts this process at the first event of a kind."""
    waiting = [True]

    def listener(event: Event) -> None:
        if waiting and when(event):
            waiting.clear()
            os.kill(os.getpid(), signal.SIGINT)

    return listener


def tasks_of(tiny: TinyTask, out: Path) -> list[TrainSettings]:
    """One of each method, each with another seed, batch size and number of steps."""
    return [
        replace(
            tiny.settings(
                adapter,
                data={"labels": ()},
                seed=index,
                batch_size=3 + index,
                epochs=1 + index / 2,
                checkpoint_steps=2,
            ),
            task=name,
            out=str(out / name),
        )
        for index, (name, adapter) in enumerate(METHODS.items())
    ]


def losses(report: TrainingReport | None) -> list[float]:
    assert report is not None
    return [step.loss for step in report.steps]


def by_task(outcomes: Sequence[TaskOutcome]) -> dict[str, TaskOutcome]:
    return {outcome.settings.task: outcome for outcome in outcomes}


def test_tasks_in_turns_have_the_losses_and_artifacts_that_each_has_alone(
    tiny: TinyTask, tmp_path: Path
) -> None:
    steps: list[str] = []

    def listener(event: Event) -> None:
        if isinstance(event, StepReport):
            steps.append(event.task)

    outcomes = train_several(tasks_of(tiny, tmp_path / "together"), tiny.model, listener=listener)
    assert [outcome.settings.task for outcome in outcomes] == list(METHODS)
    assert steps[:8] == [*METHODS, *METHODS]
    for outcome, settings in zip(outcomes, tasks_of(tiny, tmp_path / "alone"), strict=True):
        alone = train(settings, tiny.model)
        assert outcome.report is not None
        assert losses(outcome.report) == losses(alone)
        assert outcome.report.evaluation == alone.evaluation
        assert outcome.report.artifact.digest == alone.artifact.digest
        assert (tmp_path / "together" / settings.task / "adapter_config.json").is_file()


def test_a_task_is_told_and_done_as_soon_as_its_last_step_is_taken(tiny: TinyTask, tmp_path: Path) -> None:
    told: list[str] = []

    def on_outcome(outcome: TaskOutcome) -> None:
        told.append(outcome.settings.task)
        assert (Path(outcome.settings.out) / "training/report.json").is_file()

    tasks = tasks_of(tiny, tmp_path / "together")
    short = replace(tasks[2], optimization=replace(tasks[2].optimization, max_steps=1))
    train_several([tasks[0], short], tiny.model, on_outcome=on_outcome)
    assert told == ["prefix", "lora"]


def test_a_task_that_fails_stops_alone(tiny: TinyTask, tmp_path: Path) -> None:
    good, diverging, empty, other = tasks_of(tiny, tmp_path / "together")
    diverging = replace(
        diverging,
        optimization=replace(diverging.optimization, learning_rate=1e30, warmup_steps=0, max_grad_norm=0),
    )
    (tmp_path / "empty.jsonl").touch()
    empty = replace(empty, data=replace(empty.data, train=str(tmp_path / "empty.jsonl")))
    outcomes = by_task(train_several([good, diverging, empty, other], tiny.model))
    assert isinstance(outcomes["bottleneck"].error, DivergedError)
    assert isinstance(outcomes["prefix"].error, DataError)
    assert outcomes["bottleneck"].report is None
    alone = tasks_of(tiny, tmp_path / "alone")
    assert losses(outcomes["lora"].report) == losses(train(alone[0], tiny.model))
    assert losses(outcomes["prompt"].report) == losses(train(alone[3], tiny.model))


def test_an_interrupt_keeps_every_task_and_all_resume_with_the_same_losses(
    tiny: TinyTask, tmp_path: Path
) -> None:
    def is_fifth_step(event: Event) -> bool:
        return isinstance(event, StepReport) and (event.task, event.step) == ("prefix", 5)

    tasks = tasks_of(tiny, tmp_path / "together")
    tasks[1] = replace(
        tasks[1], optimization=replace(tasks[1].optimization, max_steps=2, schedule="constant")
    )
    with pytest.raises(TrainingInterrupted) as raised:
        train_several(tasks, tiny.model, listener=interrupting(is_fifth_step))
    kept = {path.parent.parent.parent.name: path.name for path in raised.value.checkpoints}
    assert kept == {"lora": "step-000005", "prefix": "step-000005", "prompt": "step-000004"}
    outcomes = by_task(train_several(tasks, tiny.model, resume=True))
    for settings in tasks_of(tiny, tmp_path / "alone"):
        alone = losses(train(settings, tiny.model))
        resumed = losses(outcomes[settings.task].report)
        assert resumed == alone[: len(resumed)]
        assert len(resumed) == (2 if settings.task == "bottleneck" else len(alone))


def test_an_interrupt_while_one_is_evaluated_keeps_the_others(tiny: TinyTask, tmp_path: Path) -> None:
    def is_evaluation(event: Event) -> bool:
        return isinstance(event, EvaluationProgress) and event.task == "lora"

    tasks = tasks_of(tiny, tmp_path / "together")
    with pytest.raises(TrainingInterrupted) as raised:
        train_several(tasks[::3], tiny.model, listener=interrupting(is_evaluation))
    assert {path.parent.parent.parent.name for path in raised.value.checkpoints} == {"lora", "prompt"}
    outcomes = train_several(tasks[::3], tiny.model, resume=True)
    assert [outcome.error for outcome in outcomes] == [None, None]


def test_resuming_begins_the_tasks_that_have_no_checkpoint(tiny: TinyTask, tmp_path: Path) -> None:
    tasks = tasks_of(tiny, tmp_path / "together")
    with pytest.raises(TrainingInterrupted):
        train(
            tasks[0],
            tiny.model,
            listener=interrupting(lambda event: isinstance(event, CheckpointReport)),
        )
    assert has_checkpoint(Path(tasks[0].out))
    assert not has_checkpoint(Path(tasks[1].out))
    begun: list[tuple[str, int]] = []

    def listener(event: Event) -> None:
        if isinstance(event, StepReport) and event.task not in dict(begun):
            begun.append((event.task, event.step))

    train_several(tasks[:2], tiny.model, resume=True, listener=listener)
    assert begun == [("lora", 3), ("bottleneck", 1)]


def test_tasks_of_two_bases_are_refused(tiny: TinyTask, tmp_path: Path) -> None:
    one, two, *_ = tasks_of(tiny, tmp_path)
    with pytest.raises(SettingError, match="bottleneck and lora do not have the same base"):
        common_base([one, replace(two, model=replace(two.model, quantization="none"))])
    with pytest.raises(SettingError, match="there are none"):
        common_base([])
