"""Where the artifacts of the example tasks lie; ``composed.json`` says which tasks have several."""

from __future__ import annotations

import json
from pathlib import Path

from examples.settings import PromptOverSettings
from examples.tasks import TASKS
from examples.tasks.task import ExampleTask

_COMPOSED = Path(__file__).with_name("composed.json")


def base_task(task: ExampleTask) -> ExampleTask | None:
    """The task whose adapter this one's is trained over; None where it stands alone."""
    over = task.adapter.over if isinstance(task.adapter, PromptOverSettings) else None
    return None if over is None else TASKS[over]


def artifact_directory(task: ExampleTask, root: Path) -> Path:
    """What training a task writes: ``adapters/<task>``, or ``parts/<task>`` if it is of no use alone."""
    return root / ("adapters" if base_task(task) is None else "parts") / task.name


def parts_of(task: ExampleTask, root: Path) -> list[tuple[Path, float]]:
    """The artifacts that a task is served from, with their weights; one of weight 1 unless it is composed."""
    parts = json.loads(_COMPOSED.read_text(encoding="utf-8")).get(task.name)
    if parts is None:
        return [(artifact_directory(task, root), 1.0)]
    return [(root / part["adapter"], part["weight"]) for part in parts]
