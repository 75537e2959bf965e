"""``manyhats adapters register`` and ``upload``: make an adapter a version of a task."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyhats.cli.adapters.batch import Item, Outcome, parse_items, perform
from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection, connect, takes_connection
from manyhats.cli.terminal.failures import CommandError, UsageError
from manyhats.cli.terminal.output import human_bytes, print_json, to_plain
from manyhats.cli.terminal.progress import Report, shown_progress, shown_wait

if TYPE_CHECKING:
    from manyhats.client import Client, RegisterOptions, Registration

FORMATS_HELP = """[bold]What can be registered[/bold]

  A directory as PEFT saves it, with adapter_config.json and
  adapter_model.safetensors: LoRA (also QLoRA and rank-stabilised), DoRA,
  AdaLoRA, VeRA, IA3, prefix tuning, prompt tuning, P-tuning, multitask
  prompt tuning, trainable tokens.

  A directory as AdapterHub's adapters saves it, with adapter_config.json
  and adapter.safetensors: bottleneck adapters (seq_bn, double_seq_bn,
  par_bn and variants), LoRA, IA3, prefix tuning, unions of them, and on
  encoders prompt tuning and ReFT.

  `manyhats adapters inspect` tells what in a directory would be refused,
  `manyhats adapters convert` turns a pickle into safetensors.
"""
REGISTER_HELP = f"""Register an adapter that the server can read as a task's next version.

PATH is an adapter's directory under one of the --adapter-root directories
of the server, or a URL under one of its --adapter-url-prefix. The server
copies it, so it may change or be removed afterwards. Registering the same
files again makes no new version. `manyhats adapters upload` sends a
directory from this machine.

Any number of TASK=PATH registers several; so does a directory on this
machine whose subdirectories are adapters, each named after its task. One
that fails does not stop the others, and is reported at the end.

With --part instead of PATH, several adapters act together as one task,
each scaled by its weight: LoRAs of any ranks, and at most one with
virtual tokens (prefix or prompt tuning).

{FORMATS_HELP}
[bold]Examples[/bold]

  $ manyhats adapters register sql ./tasks/sql

  $ manyhats adapters register sql ./tasks/sql --validate-only

  $ manyhats adapters register sql s3://bucket/tasks/sql --no-activate

  $ manyhats adapters register ./tasks

  $ manyhats adapters register pirate-sql --part ./tasks/sql \\
    --part ./tasks/pirate=0.5
"""
UPLOAD_HELP = f"""Send an adapter's directory to the server, as the next version of a task.

From PATH, adapter_config.json, the safetensors and the tokenizer's text
files (such as tokenizer.json and chat_template.jinja) are sent. Nothing
shows on the server until every byte is verified; an interrupted upload
leaves nothing behind, and may be repeated.

Any number of TASK=PATH sends several; so does a directory whose
subdirectories are adapters, each named after its task. One that fails does
not stop the others, and is reported at the end; a subdirectory without an
adapter_config.json is skipped, or fails if it has weights.

{FORMATS_HELP}
[bold]Examples[/bold]

  $ manyhats adapters upload sql ./tasks/sql

  $ manyhats adapters upload sql ./tasks/sql --server 10.0.0.7:50051

  $ manyhats adapters upload sql=./sql-new polite=./polite

  $ manyhats adapters upload ./tasks
"""

_FORMS = "TASK PATH | TASK=PATH... | DIR"
Adapters = Annotated[
    list[str],
    typer.Argument(
        metavar=_FORMS,
        help="A task, and the adapter's directory as the server sees it, or a URL; or several.",
        show_default=False,
    ),
]
Directories = Annotated[
    list[str],
    typer.Argument(
        metavar=_FORMS,
        help="A task, and the adapter's directory on this machine; or several.",
        show_default=False,
    ),
]
Part = Annotated[
    list[str] | None,
    typer.Option(
        "--part",
        metavar="PATH[=WEIGHT]",
        help="One of several adapters that act together, instead of PATH. Repeatable.",
    ),
]
Activate = Annotated[
    bool, typer.Option("--activate/--no-activate", help="Whether requests for the task use it from now on.")
]
ValidateOnly = Annotated[bool, typer.Option("--validate-only", help="Check everything and store nothing.")]
ExpectedDigest = Annotated[
    str, typer.Option("--expected-digest", metavar="sha256:...", help="Refuse any files but these.")
]
RequestId = Annotated[
    str, typer.Option("--request-id", metavar="ID", help="Makes it safe to repeat this command.")
]
Label = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="KEY=VALUE",
        help="Stored with the version; default.temperature=0 and the like are its defaults. Repeatable.",
    ),
]

AssumeBase = Annotated[
    bool,
    typer.Option(
        "--assume-base", help="Accept it for the server's base, whatever base it names; shapes must fit."
    ),
]


@takes_connection
def register(
    adapters: Adapters,
    part: Part = None,
    activate: Activate = True,
    validate_only: ValidateOnly = False,
    expected_digest: ExpectedDigest = "",
    request_id: RequestId = "",
    label: Label = None,
    assume_base: AssumeBase = False,
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Register adapters that the server can read as the next versions of their tasks."""
    options = _options(activate, validate_only, expected_digest, request_id, label, assume_base)
    done = "valid" if validate_only else "registered"
    has_path = len(adapters) > 1 or "=" in adapters[0] or Path(adapters[0]).is_dir()
    if has_path == bool(part):
        raise UsageError("give either PATH or --part (see `manyhats adapters register --help`)")
    if part:
        parts = [parse_part(text) for text in part]
        with connect(connection) as client, shown_wait():
            registration = client.register_adapter(adapters[0], parts=parts, **options)
        _print(registration, done, as_json, options)
        return

    def make(client: Client, item: Item, report: Report) -> Registration:
        return client.register_adapter(item.task, as_uri(item.path), **options)

    _make_each(adapters, make, options, connection, done, as_json)


@takes_connection
def upload(
    adapters: Directories,
    activate: Activate = True,
    validate_only: ValidateOnly = False,
    expected_digest: ExpectedDigest = "",
    request_id: RequestId = "",
    label: Label = None,
    assume_base: AssumeBase = False,
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Send adapters' directories to the server, as the next versions of their tasks."""
    options = _options(activate, validate_only, expected_digest, request_id, label, assume_base)
    done = "valid" if validate_only else "uploaded"

    def send(client: Client, item: Item, report: Report) -> Registration:
        return client.upload_adapter(
            item.task, item.path, progress=lambda sent, total: report("upload", sent, total), **options
        )

    _make_each(adapters, send, options, connection, done, as_json)


def _make_each(
    texts: list[str],
    make: Callable[[Client, Item, Report], Registration],
    options: RegisterOptions,
    connection: Connection,
    done: str,
    as_json: bool,
) -> None:
    """Register what the arguments name, print the outcomes, and fail if one did.

    If they are a task and a path, only its answer is printed, and its failure is the command's.
    """
    items = _items(texts, options)
    is_one = len(texts) == 2 and items == [Item(*texts)]
    with connect(connection) as client, shown_progress() as report:
        if is_one:
            outcomes = [Outcome(items[0], make(client, items[0], report))]
        else:
            outcomes = perform(items, lambda item: make(client, item, report), report)
    _print_outcomes(outcomes, options, is_one, done, as_json)


def _items(texts: list[str], options: RegisterOptions) -> list[Item]:
    items = parse_items(texts)
    if len(items) > 1:
        for name in ("expected_digest", "request_id"):
            if options[name]:
                raise UsageError(f"--{name.replace('_', '-')} is for one adapter, not for {len(items)}")
    return items


def _print_outcomes(
    outcomes: list[Outcome], options: RegisterOptions, is_one: bool, done: str, as_json: bool
) -> None:
    """Print the outcome of each, and fail if one did."""
    registered = [each.registration for each in outcomes if each.registration is not None]
    failed = [each for each in outcomes if each.registration is None]
    if as_json and not is_one:
        print_json([_as_json(each) for each in outcomes])
    else:
        for registration in registered:
            _print(registration, done, as_json, options)
    for each in failed:
        typer.echo(f"failed: {each.item.task}: {' '.join(each.error.split())}", err=True)
    if failed:
        names = ", ".join(each.item.task for each in failed)
        which = "the adapter" if len(outcomes) == 1 else f"{len(failed)} of {len(outcomes)} adapters"
        raise CommandError(f"{which} failed: {names}")


def _as_json(outcome: Outcome) -> dict[str, Any]:
    item = {"task_id": outcome.item.task, "path": outcome.item.path}
    if outcome.registration is None:
        return {**item, "error": outcome.error}
    return {**item, "registration": to_plain(outcome.registration)}


def as_uri(path: str) -> str:
    """A directory on this machine by its absolute path, since the server has another working directory."""
    return str(Path(path).resolve()) if path and "://" not in path and Path(path).exists() else path


def parse_part(text: str) -> tuple[str, float]:
    """``PATH=WEIGHT``, or ``PATH`` of weight 1, as uri and weight.

    What follows the last ``=`` is a weight if it is a number, and part of the path otherwise.

    Raises:
        UsageError: it has no path, or a weight that is not finite.
    """
    path, equals, weight = text.rpartition("=")
    try:
        parsed = (path, float(weight)) if equals else (text, 1.0)
    except ValueError:
        if not Path(text).exists() and Path(path).exists():
            raise UsageError(f"--part: {weight!r} is not a weight, in {text!r}") from None
        parsed = (text, 1.0)
    if not parsed[0] or not math.isfinite(parsed[1]):
        raise UsageError(f"--part must be PATH or PATH=WEIGHT, not {text!r}")
    return as_uri(parsed[0]), parsed[1]


def parse_labels(labels: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` texts as a mapping.

    Raises:
        UsageError: one has no ``=``, or no key.
    """
    parsed: dict[str, str] = {}
    for label in labels:
        key, equals, value = label.partition("=")
        if not (key and equals):
            raise UsageError(f"--label must be KEY=VALUE, not {label!r}")
        parsed[key] = value
    return parsed


def _options(
    activate: bool,
    validate_only: bool,
    expected_digest: str,
    request_id: str,
    label: list[str] | None,
    assume_base: bool,
) -> RegisterOptions:
    return {
        "activate": activate,
        "validate_only": validate_only,
        "expected_digest": expected_digest,
        "request_id": request_id,
        "labels": parse_labels(label or []),
        "assume_base": assume_base,
    }


def _print(registration: Registration, done: str, as_json: bool, options: RegisterOptions) -> None:
    info = registration.adapter
    labels = options.get("labels")
    if labels and not registration.created and dict(info.labels) != labels:
        typer.echo(f"note: {info.name} keeps the labels that it was registered with", err=True)
    if as_json:
        print_json(registration)
        return
    already = "" if registration.created or done == "valid" else "already "
    effect = () if info.effect is None else (f"effect {info.effect:.3g}",)
    facts = ", ".join((info.method, info.state, human_bytes(info.size_bytes), *effect, info.digest))
    typer.echo(f"{already}{done}: {info.name} ({facts})")
    for note in info.notes:
        typer.echo(f"note: {note}", err=True)
