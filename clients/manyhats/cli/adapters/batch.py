"""Several adapters in one ``register`` or ``upload``: which tasks and paths are meant, and how each fares."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from manyhats.cli.options.connection import describe
from manyhats.cli.terminal.failures import UsageError
from manyhats.cli.terminal.progress import Report

if TYPE_CHECKING:
    from manyhats.client import Registration

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin")
_PAIR = re.compile(r"([A-Za-z0-9._-]+)=(.+)", re.DOTALL)
_FORMS = "give TASK PATH, any number of TASK=PATH, or a directory of adapters"


@dataclass(frozen=True, slots=True)
class Item:
    """One adapter: the task that it becomes a version of, and where it is."""

    task: str
    path: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item: a registration, or why there is none."""

    item: Item
    registration: Registration | None = None
    error: str = ""


def parse_items(texts: Sequence[str]) -> list[Item]:
    """The adapters that a command's arguments mean.

    They are a task and a path, or any number of ``TASK=PATH`` and of directories on this machine, each of whose
    subdirectories with an adapter is an item, named after its task; one with only weights is an item too, which fails.

    Raises:
        UsageError: they are none of these, a directory holds no adapters, or a task is given twice.
    """
    if len(texts) == 2 and not _PAIR.fullmatch(texts[0]) and not _is_folder(texts[0]):
        return [Item(*texts)]
    items: list[Item] = []
    for text in texts:
        pair = _PAIR.fullmatch(text)
        if pair is not None and not Path(text).is_dir():
            items.append(Item(pair[1], pair[2]))
        else:
            items += _in_folder(Path(text))
    if not items:
        raise UsageError(_FORMS)
    tasks = [item.task for item in items]
    if len(set(tasks)) < len(tasks):
        twice = next(task for task in tasks if tasks.count(task) > 1)
        raise UsageError(f"{twice} is given twice")
    return items


def perform(items: Sequence[Item], make: Callable[[Item], Registration], report: Report) -> list[Outcome]:
    """Register each; a failure does not stop the others, unless the server cannot be reached.

    Args:
        items: in their order.
        make: registers one, or raises ``ManyhatsError``.
        report: called with how many are done.
    """
    from manyhats.client import ManyhatsError, UnavailableError

    outcomes: list[Outcome] = []
    for number, item in enumerate(items):
        report("adapters", number, len(items))
        if lacks_config(item.path):
            outcomes.append(Outcome(item, error=f"{item.path} has weights but no {_CONFIG_FILE}"))
            continue
        try:
            outcomes.append(Outcome(item, make(item)))
        except UnavailableError as error:
            outcomes.append(Outcome(item, error=describe(error)))
            if not error.reason:
                outcomes += [Outcome(left, error="was not tried") for left in items[number + 1 :]]
                break
        except ManyhatsError as error:
            outcomes.append(Outcome(item, error=describe(error)))
    report("adapters", len(items), len(items))
    return outcomes


def lacks_config(path: str) -> bool:
    """Whether a directory on this machine has an adapter's weights but not its config."""
    folder = Path(path)
    return folder.is_dir() and not (folder / _CONFIG_FILE).exists() and _has_weights(folder)


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in _WEIGHTS for path in folder.iterdir())


def _is_folder(text: str) -> bool:
    """Whether the first of two arguments is a directory rather than a task: a bare name is a task."""
    return ("/" in text or text in (".", "..")) and Path(text).is_dir()


def _in_folder(folder: Path) -> list[Item]:
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is not a directory on this machine; {_FORMS}")
    if (folder / _CONFIG_FILE).exists():
        raise UsageError(f"{folder} is an adapter itself; give its task, as in TASK PATH")
    try:
        subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
        found = [path for path in subfolders if (path / _CONFIG_FILE).exists() or _has_weights(path)]
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror}") from error
    if not found:
        raise UsageError(f"{folder} has no subdirectory with an {_CONFIG_FILE}")
    for path in subfolders:
        if path not in found:
            typer.echo(f"skipped: {path}: has no {_CONFIG_FILE}", err=True)
    return [Item(path.name, str(path)) for path in found]
