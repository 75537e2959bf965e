"""The settings of ``manyhats train`` from flags and files, and what can be shown of them without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import typer

from manyhats.cli.terminal.output import human_bytes, human_count, print_json, print_table
from manyhats.settings.declaration import values_of
from manyhats.settings.printing import config_text
from manyhats.trainer.memory import NO_DATA, MemoryPrediction, predict_memory
from manyhats.trainer.settings.settings import SETTINGS, TrainSettings
from manyhats.trainer.settings.settings_file import (
    DEFAULT_OUT,
    make_settings,
    method_of,
    read_file,
    read_settings,
    read_tasks,
)

_ANY_TASK = "task"

_WHOSE = {"cpu": "memory of the process", "cuda": "memory of the CUDA device"}


def read(
    flags: Mapping[str, Any], config: Path | None, tasks: Path | None, *, is_dry_run: bool
) -> Sequence[TrainSettings]:
    """The settings of each task; flags win over files.

    Args:
        flags: those that are given.
        config: a settings file.
        tasks: a file of several tasks.
        is_dry_run: memory can be predicted without a task's name, and without data.

    Raises:
        SettingError: one is wrong.
    """
    if tasks is not None:
        return read_tasks(tasks, flags)
    unnamed = {"task": _ANY_TASK, "data": NO_DATA} if is_dry_run else {}
    settings = read_settings(config, flags, unnamed) if config else make_settings({**unnamed, **flags})
    return [settings if settings.out else replace(settings, out=str(PurePath(DEFAULT_OUT, settings.task)))]


def text_of(
    settings: TrainSettings, config: Path | None, places: Mapping[str, str], method: str | None
) -> str:
    """A settings file with all settings, and as comments where they come from.

    Args:
        settings: of one task.
        config: the file that some may come from.
        places: setting → the flag or variable that it comes from.
        method: from the command line; None if the file has it.

    Raises:
        SettingError: the file cannot be read any more.
    """
    in_file = dict.fromkeys(read_file(config) if config else (), str(config))
    where = "METHOD" if method else config
    own = config_text(SETTINGS, values_of(settings), {**in_file, **places})
    return f"method: {method_of(settings)}  # {where}\n{own}"


def show_memory(tasks: Sequence[TrainSettings], as_json: bool) -> None:
    """Print how much memory a training of these tasks would take at most.

    Raises:
        ModelError, SettingError, DataError: as ``predict_memory``.
    """
    prediction = predict_memory(tasks)
    if as_json:
        print_json(_as_plain(prediction))
        return
    total = prediction.total
    rows = [(name, human_bytes(size), f"{size / total:.1%}") for name, size in prediction.parts.items()]
    print_table(
        (_WHOSE[prediction.device], "bytes", "share"), [*rows, ("total", human_bytes(total), "100.0%")]
    )
    for line in (f"peak reached in: {prediction.phase}", *_tasks(prediction)):
        typer.echo(line)
    for note in prediction.notes:
        typer.echo(f"note: {note}", err=True)


def _tasks(prediction: MemoryPrediction) -> list[str]:
    """What each task's prediction assumed."""
    return [
        f"{task.settings.task}: {human_count(task.adapter.num_trained)} trained parameters "
        f"({task.adapter.num_trained / prediction.num_parameters:.2%}), largest batch of "
        f"{task.batch.num_tokens} tokens in {task.batch.num_rows} rows of up to "
        f"{task.batch.longest + task.batch.num_shared}"
        for task in prediction.tasks
    ]


def _as_plain(prediction: MemoryPrediction) -> dict[str, object]:
    return {
        "device": prediction.device,
        "total_bytes": prediction.total,
        "parts": dict(prediction.parts),
        "phase": prediction.phase,
        "parameters": prediction.num_parameters,
        "tasks": [
            {
                "task": task.settings.task,
                "method": task.settings.adapter.method.value,
                "trained_parameters": task.adapter.num_trained,
                "batch": task.batch,
            }
            for task in prediction.tasks
        ],
        "notes": list(prediction.notes),
    }
