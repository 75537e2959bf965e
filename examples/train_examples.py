"""Trains the example adapters: ``make examples``, or ``python -m examples.train_examples [--output DIR] [TASK …]``.

Takes about a minute a task on two cores. Each adapter gets a model card that has the held-out accuracy before and
after; ``results.json`` has those of all.
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
from examples.peft_adapters import BASE_ALIAS
from examples.peft_training import train_with_peft
from examples.results import ExampleResult, read_results, table, write_result
from examples.settings import PeftSettings
from examples.tasks import TASKS
from examples.tasks.task import ExampleTask
from examples.training import TrainingResult, train_example
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.engine.config import Dtype
from manyhats.trainer.model.computation import resolve_computation
from manyhats.trainer.settings.settings import ModelSettings

_ROOT = Path(__file__).parent


def main() -> None:
    """Train the tasks named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"any of {', '.join(TASKS)}; all by default")
    parser.add_argument("--output", type=Path, default=_ROOT, help="gets adapters/, parts/ and results.json")
    parser.add_argument("--threads", type=int, default=0, help="0 is one per processor")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.tasks if name not in TASKS]
    if unknown:
        parser.error(f"no such task: {', '.join(unknown)}")
    # PEFT reads an attribute that transformers has renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = ModelSettings(model=BASE_ALIAS, gradient_checkpointing=False, num_threads=arguments.threads)
    base = load_model(BASE_ALIAS, quantization="nf4", dtype=resolve_computation(options).dtype)
    for task in _ordered([TASKS[name] for name in arguments.tasks or TASKS]):
        _train_task(base, task, arguments.output, options)
    print("\n".join(table(read_results(arguments.output))))


def _ordered(tasks: list[ExampleTask]) -> list[ExampleTask]:
    """Tasks that others are trained over come first."""
    return sorted(tasks, key=lambda task: base_task(task) is not None)


def _train_task(base: LoadedModel, task: ExampleTask, root: Path, options: ModelSettings) -> None:
    directory = artifact_directory(task, root)
    result = _train(base, task, root, options)
    print(f"{task.name}: trained in {result.duration_s:.0f} s, evaluating", flush=True)
    dtype = resolve_computation(options).dtype_name
    evaluation = _evaluate(base, task, root, dtype=dtype, num_threads=options.num_threads)
    write_card(directory, task, result, evaluation, dtype)
    write_result(
        root,
        task.name,
        ExampleResult(
            method=task.adapter.method.value.replace("_", " "),
            library=result.library,
            num_items=evaluation.num_items,
            base=evaluation.base,
            instructed=evaluation.instructed,
            task=evaluation.task,
            num_bytes=sum(path.stat().st_size for path in directory.iterdir() if path.name != "README.md"),
            seconds=round(result.duration_s, 1),
        ),
    )
    print(
        f"{task.name}: {evaluation.num_items} held-out messages, right: base {percent(evaluation.base, evaluation)} %, "
        f"asked in words {percent(evaluation.instructed, evaluation)} %, "
        f"adapter {percent(evaluation.task, evaluation)} %\n"
        f"  {task.demo}\n  base: {in_table(evaluation.base_demo)}\n  task: {in_table(evaluation.task_demo)}",
        flush=True,
    )


def _train(base: LoadedModel, task: ExampleTask, root: Path, options: ModelSettings) -> TrainingResult:
    directory = artifact_directory(task, root)
    if not isinstance(task.adapter, PeftSettings):
        return train_example(base, task, task.adapter, directory, options=options)
    over = base_task(task)
    return train_with_peft(
        base, task, task.adapter, directory, over=None if over is None else artifact_directory(over, root)
    )


def _evaluate(
    base: LoadedModel, task: ExampleTask, root: Path, *, dtype: Dtype, num_threads: int
) -> Evaluation:
    """Register what was written, as a server would, and answer with it."""
    parts = [Part(str(directory), weight) for directory, weight in parts_of(task, root)]
    with (
        TemporaryDirectory(prefix="manyhats-examples-") as scratch,
        closing(open_store(scratch, base.description, [root])) as store,
    ):
        is_plain = len(parts) == 1
        registration = (
            store.register(Registration(task.name, Uri(parts[0].uri)))
            if is_plain
            else store.register(Registration(task.name, Parts(parts)))
        )
        return evaluate(base, task, registration.record, store.lower, dtype=dtype, num_threads=num_threads)


if __name__ == "__main__":
    main()
