"""``python -m benchmarks.training.tasks``: four tasks trained together on one base, against one after another.

Both on a base that is in memory already, by turns, and with the losses compared. A command for each task would load the
base each time; how long that takes is told besides.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

METHODS = ("lora", "bottleneck", "prefix", "prompt")
_NAMES = ("together", "one after another")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One way of training all tasks: wall time, that of their steps alone, and each task's losses."""

    seconds: float
    step_seconds: float
    losses: Mapping[str, Sequence[float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per run and the ratio of the medians; 1 if any loss differs."""
    options = _parse(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before any library starts its threads
    with TemporaryDirectory(prefix="manyhats-bench-") as directory:
        runs = measure(Path(directory), options)
    seconds = {name: median(run.seconds for run in runs[name]) for name in _NAMES}
    steps = {name: median(run.step_seconds for run in runs[name]) for name in _NAMES}
    are_same = len({json.dumps(run.losses) for name in _NAMES for run in runs[name]}) == 1
    ratio = seconds["together"] / seconds["one after another"]
    print(f"together takes {ratio:.3f} of the time of one after another", end="")
    print(f" ({steps['together'] / steps['one after another']:.3f} of the steps' alone)")
    print(f"losses: {'the same' if are_same else 'NOT THE SAME'}")
    return 0 if are_same else 1


def measure(directory: Path, options: argparse.Namespace) -> Mapping[str, Sequence[Trained]]:
    """Every run, in each round the one that began the last comes second."""
    from manyhats.engine.checkpoints.loader import load_model
    from manyhats.trainer.model.computation import resolve_computation
    from manyhats.trainer.settings.settings_file import make_settings

    data = {method: _write_rows(directory / f"{method}.jsonl", method, options) for method in METHODS}
    tasks = [
        make_settings(
            {
                "method": method,
                "task": method,
                "data": str(data[method]),
                "model": options.model,
                "quantization": "nf4",
                "batch_size": options.batch_size,
                "device": "cpu",
                "num_threads": options.threads,
                "seed": index,
            }
        )
        for index, method in enumerate(METHODS)
    ]
    began_s = time.perf_counter()
    dtype = resolve_computation(tasks[0].model).dtype
    model = load_model(options.model, quantization="nf4", dtype=dtype)
    print(f"loading the base: {time.perf_counter() - began_s:.1f} s, {dtype}", flush=True)
    ways: dict[str, Callable[[Sequence[Any], Any], Sequence[Any]]] = dict(
        zip(_NAMES, (_together, _one_after_another), strict=True)
    )
    _together([replace(task, out=str(directory / "warm-up" / task.task)) for task in tasks[:1]], model)
    runs: dict[str, list[Trained]] = {name: [] for name in _NAMES}
    for index in range(options.rounds):
        for name in _NAMES[:: 1 if index % 2 == 0 else -1]:
            out = directory / f"{index} {name}"
            run = _timed(ways[name], [replace(task, out=str(out / task.task)) for task in tasks], model)
            runs[name].append(run)
            print(
                f"round {index + 1}, {name}: {run.seconds:.1f} s ({run.step_seconds:.1f} s of steps)",
                flush=True,
            )
    return runs


def _timed(
    train_all: Callable[[Sequence[Any], Any], Sequence[Any]], tasks: Sequence[Any], model: Any
) -> Trained:
    began_s = time.perf_counter()
    reports = train_all(tasks, model)
    seconds = time.perf_counter() - began_s
    return Trained(
        seconds=seconds,
        step_seconds=sum(step.seconds for report in reports for step in report.steps),
        losses={report.settings.task: [step.loss for step in report.steps] for report in reports},
    )


def _together(tasks: Sequence[Any], model: Any) -> Sequence[Any]:
    from manyhats.trainer.train import train_several

    outcomes = train_several(tasks, model)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.report for outcome in outcomes]


def _one_after_another(tasks: Sequence[Any], model: Any) -> Sequence[Any]:
    from manyhats.trainer.train import train

    return [train(task, model) for task in tasks]


def _write_rows(path: Path, seed: str, options: argparse.Namespace) -> Path:
    """Texts of words that are one token each, as many rows as the steps need."""
    words = (" the", " of", " and", " to", " in", " is", " that", " for", " with", " as")
    choose = random.Random(seed)
    with path.open("w") as file:
        for _ in range(options.steps * options.batch_size):
            length = choose.randint(options.longest // 2, options.longest - 1)
            file.write(json.dumps({"text": "".join(choose.choices(words, k=length))}) + "\n")
    return path


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.tasks", description=__doc__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="alias, directory or hub id (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=cores, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="of each task (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step (%(default)s)")
    parser.add_argument("--longest", type=int, default=64, help="tokens of a row (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
