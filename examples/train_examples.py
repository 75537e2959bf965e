"""Trains the example adapters: ``python -m examples.train_examples [--output DIR] [TASK …]`` from the root.

Takes about five minutes a task on one core. Each adapter is saved as PEFT saves it, with a model card that has
the held-out accuracy before and after.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
import transformers

from examples.evaluation import evaluate
from examples.model_card import in_table, percent, write_card
from examples.tasks import TASKS
from examples.tasks.task import ExampleTask
from examples.training import TrainingSettings, add_adapter, load_base, save, train
from manyhats.engine.model.loader import LoadedModel

_ADAPTERS = Path(__file__).parent / "adapters"


def main() -> None:
    """Train the tasks named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"any of {', '.join(TASKS)}; all by default")
    parser.add_argument("--output", type=Path, default=_ADAPTERS, help="holds a directory per task")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.tasks if name not in TASKS]
    if unknown:
        parser.error(f"no such task: {', '.join(unknown)}")
    torch.set_num_threads(arguments.threads)
    # PEFT reads an attribute that transformers has renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    base = load_base()
    for name in arguments.tasks or TASKS:
        _train_task(base, TASKS[name], TrainingSettings(), arguments.output / name)


def _train_task(base: LoadedModel, task: ExampleTask, settings: TrainingSettings, directory: Path) -> None:
    model = add_adapter(base, task, settings.seed)
    result = train(model, base, task, settings)
    save(model, directory)
    print(f"{task.name}: trained in {result.duration_s:.0f} s, evaluating", flush=True)
    evaluation = evaluate(model, base, task)
    write_card(directory, task, settings, result, evaluation)
    print(
        f"{task.name}: {evaluation.num_items} held-out messages, right: base {percent(evaluation.base, evaluation)} %, "
        f"asked in words {percent(evaluation.instructed, evaluation)} %, "
        f"adapter {percent(evaluation.task, evaluation)} %\n"
        f"  {task.demo}\n  base: {in_table(evaluation.base_demo)}\n  task: {in_table(evaluation.task_demo)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
