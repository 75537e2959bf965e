"""The data of the example tasks as files for ``manyhats train``: ``python -m examples.data TASK --output DIR``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from examples.tasks import TASKS
from examples.tasks.task import ExampleTask, Item, held_out_items, train_items

NUM_HELD_OUT = 60


def main() -> None:
    """Write a task's data, and print how to train on it."""
    parser = argparse.ArgumentParser(description="Write the data of an example task.")
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    train, held_out = write_data(TASKS[arguments.task], arguments.output)
    print(f"manyhats train qlora --task {arguments.task} --data {train} --eval {held_out} --chat")


def write_data(task: ExampleTask, directory: Path) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``eval.jsonl``; each message is the prompt, its answer the completion."""
    directory.mkdir(parents=True, exist_ok=True)
    files = directory / "train.jsonl", directory / "eval.jsonl"
    for path, items in zip(files, (train_items(task), held_out_items(task, NUM_HELD_OUT)), strict=True):
        path.write_text(_lines(items), encoding="utf-8")
    return files


def _lines(items: Sequence[Item]) -> str:
    rows = ({"prompt": item.message, "completion": item.answer} for item in items)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
