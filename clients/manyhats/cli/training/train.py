"""``manyhats train``: from a data file to an artifact that the server accepts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from manyhats.cli.options import common as options
from manyhats.cli.options.settings import Given, refuse_unknown_variables, takes
from manyhats.cli.terminal.extras import needs_extra, quiet_libraries
from manyhats.cli.terminal.failures import EXIT_INTERRUPTED, CommandError, UsageError
from manyhats.cli.training.server import Server
from manyhats.server.lifetime.config import SETTINGS as SERVE_SETTINGS
from manyhats.trainer.settings.declaring import GROUPS
from manyhats.trainer.settings.settings import SETTINGS

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

lora is trained on the dense base, qlora on one in NF4, and all others on
the base as a server holds it, unless --quantization says otherwise.

Each line of the data is a JSON object with prompt and completion (only the
completion is learned), with text, or with the messages of a chat. With --head
texts are read instead of continued, and a line has text and label, or tokens
and tags, or a query and a positive text.

[bold]Examples[/bold]

  $ manyhats train qlora --task sql --data train.jsonl --eval eval.jsonl

  $ manyhats train prefix --task sql --data train.jsonl \\
    --register 127.0.0.1:50051

  $ manyhats train qlora --task mood --data train.jsonl \\
    --eval eval.jsonl --label good --label bad \\
    --register 127.0.0.1:50051 --activate-if "accuracy >= 0.9"

  $ manyhats train lora --head classification --task topic \\
    --data train.jsonl --model all-minilm-l6-v2

  $ manyhats train lora --task sql --data train.jsonl --dry-run

  $ manyhats train qlora --config sql.yaml --epochs 3

  $ manyhats train --tasks tasks.yaml --out ./tasks

The artifact, a model card and a report are left in ./tasks/T, or in --out.
Ctrl-C writes a checkpoint, and the same command with --resume continues
from it. A settings file uses the flags' names, one 'name: value' each; a
variable is a flag, too: --batch-size 8 is MANYHATS_BATCH_SIZE=8. A
file for --tasks has such settings for all tasks, and a list 'tasks' with
each one's own, including its 'method'; the tasks take turns on one base.
"""


def _run(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=GROUPS[0], **settings)


Method: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="METHOD",
        help="lora, qlora, dora, ia3, bottleneck, prefix, prompt or ptuning. qlora is LoRA on the base in NF4,"
        " lora on the dense base unless --quantization nf4 is given; the others take it as a server does.",
        show_default=False,
    ),
]
Config: TypeAlias = Annotated[
    Path | None,
    _run("--config", metavar="FILE", help="YAML with settings of these flags' names; flags win."),
]
Tasks: TypeAlias = Annotated[
    Path | None,
    _run(
        "--tasks",
        metavar="FILE",
        help="YAML: shared settings, and a list `tasks` of several to train at once on one base.",
    ),
]
Resume: TypeAlias = Annotated[
    bool, _run("--resume", help="Go on from the newest checkpoint in the output's directory.")
]
DryRun: TypeAlias = Annotated[
    bool, _run("--dry-run", help="Train nothing: print how much memory it would take, part by part.")
]
PrintConfig: TypeAlias = Annotated[
    bool,
    _run(
        "--print-config", help="Train nothing: print all settings, as a file for --config, and their sources."
    ),
]


@takes(flags=SETTINGS, server=Server)
def train(
    method: Method = None,
    *,
    flags: Mapping[str, Any],
    config: Config = None,
    tasks: Tasks = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    print_config: PrintConfig = False,
    server: Server,
    as_json: options.Json = False,
) -> None:
    """Train an adapter for a task, on a base model that does not change."""
    if tasks is not None and (method is not None or config is not None):
        raise UsageError("--tasks has the methods and settings of all tasks: leave out METHOD and --config")
    if tasks is not None and print_config:
        raise UsageError("--print-config prints the settings of one task: leave out --tasks")
    refuse_unknown_variables(os.environ, SETTINGS, SERVE_SETTINGS)
    given = Given.of(SETTINGS, flags, os.environ)
    values = {**given.values, **({} if method is None else {"method": method})}
    quiet_libraries()
    with needs_extra("train"):
        from manyhats.engine.threads.openmp import sleep_soon

        sleep_soon()
        from manyhats.cli.training import runs, settings
    with trainer_errors(given.places):
        every = settings.read(values, config, tasks, is_dry_run=dry_run)
        registrar = runs.Registrar.of(server, every)
        if print_config:
            typer.echo(settings.text_of(every[0], config, given.places, method), nl=False)
        elif dry_run:
            settings.show_memory(every, as_json)
        elif tasks is not None:
            runs.train_all(every, registrar, resume, as_json)
        else:
            runs.train_one(every[0], registrar, resume, as_json)


@contextmanager
def trainer_errors(places: Mapping[str, str]) -> Iterator[None]:
    """The trainer's errors as the command's, naming settings by the flags or variables that give them.

    Raises:
        UsageError: a setting is wrong.
        CommandError: any other error.
        typer.Exit: with 130, the training was interrupted.
    """
    from manyhats.adapters.errors import AdapterError
    from manyhats.cli.training.runs import by_flags
    from manyhats.engine.errors import EngineError, ModelError
    from manyhats.trainer.errors import SettingError, TrainerError
    from manyhats.trainer.run.interrupt import TrainingInterrupted

    try:
        yield
    except SettingError as error:
        raise UsageError(by_flags(describe_setting(error.setting, str(error), places))) from error
    except (TrainerError, ModelError, EngineError, AdapterError, OSError) as error:
        raise CommandError(by_flags(str(error))) from error
    except TrainingInterrupted as error:
        hint = "; the same command with --resume continues" if error.checkpoints else ""
        typer.echo(f"{error}{hint}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error


def describe_setting(setting: str, text: str, places: Mapping[str, str]) -> str:
    """A setting's error under the name of what gives it, else of its flag; those of a tasks file keep their names."""
    if setting.startswith("tasks["):
        return text
    name, dot, rest = setting.partition(".")
    place = (
        "METHOD" if name == "method" else places.get(name) or f"--{_FLAGS.get(name, name).replace('_', '-')}"
    )
    return f"{place}{dot}{rest}: {text.removeprefix(f'{setting}: ')}"


_FLAGS = {name: each.flag for each in SETTINGS for name in (each.field, each.name)}
