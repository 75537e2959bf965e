"""The settings of ``manyhats train``: of its flags, its settings file, or its tasks' file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from manyhats.settings.declaration import values_of
from manyhats.settings.printing import config_text
from manyhats.trainer.memory import NO_DATA
from manyhats.trainer.settings.settings import SETTINGS, TrainSettings
from manyhats.trainer.settings.settings_file import (
    DEFAULT_OUT,
    make_settings,
    method_of,
    read_file,
    read_settings,
)
from manyhats.trainer.settings.tasks_file import read_tasks

_ANY_TASK = "task"


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
