"""``manyhats train --dry-run``: the predicted memory, part by part."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from manyhats.cli.output import human_bytes, human_count, print_json, print_table
from manyhats.trainer.memory import MemoryPrediction, predict_memory
from manyhats.trainer.settings.settings import TrainSettings

_WHOSE = {"cpu": "memory of the process", "cuda": "memory of the CUDA device"}


def show(tasks: Sequence[TrainSettings], as_json: bool) -> None:
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
