"""Trains the example adapters: ``python -m examples.train_examples [--output DIR] [TASK …]`` from the root.

Takes two to five minutes a task on one core. Each adapter is saved as its library does, with a model card that has
the held-out accuracy before and after.
"""

from __future__ import annotations

import argparse
import warnings
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from examples.catalogue import artifact_directory, base_task, parts_of
from examples.evaluation import Evaluation, evaluate
from examples.model_card import in_table, percent, write_card
from examples.tasks import TASKS
from examples.tasks.task import ExampleTask
from examples.training import load_base, train
from manyhats.adapters.open_store import open_store
from manyhats.adapters.store import PartSource
from manyhats.engine.model.loader import LoadedModel

_ROOT = Path(__file__).parent


def main() -> None:
    """Train the tasks named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"any of {', '.join(TASKS)}; all by default")
    parser.add_argument("--output", type=Path, default=_ROOT, help="gets adapters/ and parts/")
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
        _train_task(base, TASKS[name], arguments.output, arguments.threads)


def _train_task(base: LoadedModel, task: ExampleTask, root: Path, num_threads: int) -> None:
    directory = artifact_directory(task, root)
    over = base_task(task)
    result = train(base, task, directory, over=None if over is None else artifact_directory(over, root))
    print(f"{task.name}: trained in {result.duration_s:.0f} s, evaluating", flush=True)
    evaluation = _evaluate(base, task, root, num_threads)
    write_card(directory, task, result, evaluation)
    print(
        f"{task.name}: {evaluation.num_items} held-out messages, right: base {percent(evaluation.base, evaluation)} %, "
        f"asked in words {percent(evaluation.instructed, evaluation)} %, "
        f"adapter {percent(evaluation.task, evaluation)} %\n"
        f"  {task.demo}\n  base: {in_table(evaluation.base_demo)}\n  task: {in_table(evaluation.task_demo)}",
        flush=True,
    )


def _evaluate(base: LoadedModel, task: ExampleTask, root: Path, num_threads: int) -> Evaluation:
    """Register what was written, as a server would, and answer with it."""
    parts = [PartSource(str(directory), weight) for directory, weight in parts_of(task, root)]
    with (
        TemporaryDirectory(prefix="manyhats-examples-") as scratch,
        closing(open_store(scratch, base.description, [root])) as store,
    ):
        is_plain = len(parts) == 1
        registration = (
            store.register(task.name, parts[0].uri) if is_plain else store.register(task.name, parts=parts)
        )
        return evaluate(base, task, registration.record, store.lower, num_threads=num_threads)


if __name__ == "__main__":
    main()
