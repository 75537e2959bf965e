"""``manyhats train``: from a data file to an artifact that the server accepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import typer

from manyhats.cli import options
from manyhats.cli import train_options as opt
from manyhats.cli.extras import needs_extra, quiet_libraries
from manyhats.cli.failures import EXIT_INTERRUPTED, CommandError, UsageError
from manyhats.cli.train_flags import Flags, Server, takes_settings

HELP = """Train an adapter for a task, on a base model that does not change.

METHOD is one of

  lora        low-rank updates of linears, on the dense base
  qlora       the same on the base in 4 bits (NF4)
  dora        LoRA with trained lengths of the updated rows
  ia3         factors of keys, values and the feed-forward
  bottleneck  small MLPs behind the layers' sub-layers
  prefix      trained keys and values before the prompt
  prompt      trained embeddings before the prompt
  ptuning     the same, made by an MLP during training

All but lora use the base in NF4, unless --quantization says otherwise.

Each line of the data is a JSON object with prompt and completion (only the
completion is learned), with text, or with the messages of a chat.

[bold]Examples[/bold]

  $ manyhats train qlora --task sql --data train.jsonl --eval eval.jsonl

  $ manyhats train prefix --task sql --data train.jsonl \\
    --register 127.0.0.1:50051

  $ manyhats train qlora --task mood --data train.jsonl \\
    --eval eval.jsonl --label good --label bad \\
    --register 127.0.0.1:50051 --activate-if "accuracy >= 0.9"

  $ manyhats train lora --task sql --data train.jsonl --dry-run

  $ manyhats train qlora --config sql.yaml --epochs 3

  $ manyhats train --tasks tasks.yaml --out ./tasks

The artifact, a model card and a report are left in ./tasks/T, or in --out.
Ctrl-C writes a checkpoint, and the same command with --resume continues
from it. A settings file uses the flags' names, one 'name: value' each. A
file for --tasks has such settings for all tasks, and a list 'tasks' with
each one's own, including its 'method'; the tasks take turns on one base.
"""


@takes_settings
def train(
    method: opt.Method = None,
    *,
    flags: Flags,
    config: opt.Config = None,
    tasks: opt.Tasks = None,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    server: Server,
    as_json: options.Json = False,
) -> None:
    """Train an adapter for a task, on a base model that does not change."""
    if tasks is not None and (method is not None or config is not None):
        raise UsageError("--tasks has the methods and settings of all tasks: leave out METHOD and --config")
    quiet_libraries()
    with needs_extra("train"):
        from manyhats.engine.threads.openmp import sleep_soon

        sleep_soon()
        from manyhats.cli import train_dry_run, train_runs, train_settings
    given = {**flags.given(), **({} if method is None else {"method": method})}
    with trainer_errors():
        every = train_settings.read(given, config, tasks, is_dry_run=dry_run)
        registrar = train_runs.Registrar.of(server, every)
        if dry_run:
            train_dry_run.show(every, as_json)
        elif tasks is not None:
            train_runs.train_all(every, registrar, resume, as_json)
        else:
            train_runs.train_one(every[0], registrar, resume, as_json)


@contextmanager
def trainer_errors() -> Iterator[None]:
    """The trainer's errors as the command's, naming settings by their flags.

    Raises:
        UsageError: a setting is wrong.
        CommandError: any other error.
        typer.Exit: with 130, the training was interrupted.
    """
    from manyhats.adapters.errors import AdapterError
    from manyhats.cli.train_runs import by_flags
    from manyhats.engine.errors import EngineError, ModelError
    from manyhats.trainer.errors import SettingError, TrainerError
    from manyhats.trainer.run.interrupt import TrainingInterrupted

    try:
        yield
    except SettingError as error:
        raise UsageError(by_flags(describe_setting(error.setting, str(error)))) from error
    except (TrainerError, ModelError, EngineError, AdapterError, OSError) as error:
        raise CommandError(by_flags(str(error))) from error
    except TrainingInterrupted as error:
        hint = "; the same command with --resume continues" if error.checkpoints else ""
        typer.echo(f"{error}{hint}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error


def describe_setting(setting: str, text: str) -> str:
    """A setting's error under the name of its flag; those of a tasks file keep their names."""
    if setting.startswith("tasks["):
        return text
    name, dot, rest = setting.partition(".")
    flag = "METHOD" if name == "method" else f"--{_SINGULAR.get(name, name).replace('_', '-')}"
    return f"{flag}{dot}{rest}: {text.removeprefix(f'{setting}: ')}"


_SINGULAR: Mapping[str, str] = {
    "labels": "label",
    "target_modules": "target-module",
    "output_modules": "output-module",
    "input_modules": "input-module",
    "train": "data",
}
