"""``manyhats adapters inspect`` and ``convert``: adapters' directories on this machine, without a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.terminal.extras import needs_extra
from manyhats.cli.terminal.failures import EXIT_FAILED, CommandError
from manyhats.cli.terminal.output import human_bytes, human_count, print_fields, print_json, print_table

if TYPE_CHECKING:
    from manyhats.adapters.lowering.inspect import Inspection, SiteFacts
    from manyhats.adapters.sites import BaseDescription, TextFacts

INSPECT_HELP = """Show what an adapter's directory holds, and what would be refused.

It needs no server. With --model, the adapter is also compared with that
base model; without, only the adapter itself is checked. The exit code is 1
if anything would be refused.

[bold]Examples[/bold]

  $ manyhats adapters inspect ./tasks/sql

  $ manyhats adapters inspect ./tasks/sql --model smollm2-135m-instruct

  $ manyhats adapters inspect ./tasks/sql --json
"""
CONVERT_HELP = """Convert an adapter that was saved as a pickle to safetensors.

SRC is a directory with adapter_model.bin (PEFT) or pytorch_adapter.bin
(AdapterHub); DST is created. A pickle can run any code when it is read, so
torch's restricted loader, which refuses everything but tensors, reads it
here. A server never reads pickles.

[bold]Examples[/bold]

  $ manyhats adapters convert ./old/style ./tasks/style
"""

_PICKLES = (".bin", ".pt", ".pth")
Directory = Annotated[Path, typer.Argument(metavar="PATH", help="The directory.", show_default=False)]
Model = Annotated[
    str,
    typer.Option(
        "--model", metavar="MODEL", help="Compare with this base: a known name, a directory, or a hub id."
    ),
]
Source = Annotated[Path, typer.Argument(metavar="SRC", help="The directory with the pickle.")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="A new directory.")]


def inspect(path: Directory, model: Model = "", as_json: opt.Json = False) -> None:
    """Show what an adapter's directory holds, and what would be refused."""
    with needs_extra("server"):
        from manyhats.adapters.lowering.inspect import inspect as inspect_directory
    with _adapter_errors():
        found = inspect_directory(path, _describe(model) if model else None)
    if as_json:
        print_json(found)
    else:
        _print(found)
    if found.refusals:
        raise typer.Exit(EXIT_FAILED)


def _print(found: Inspection) -> None:
    _print_facts(found)
    if found.sites:
        columns = ("site", "operation", "layers", "rank", "shapes")
        print_table(columns, [_site_row(site) for site in found.sites])
    for note in found.notes:
        typer.echo(f"note: {note}")
    for refusal in found.refusals:
        typer.echo(f"would be refused: {refusal.reason} {refusal.subject}: {refusal.description}")
    if not found.refusals:
        typer.echo("it would be accepted")


def convert(source: Source, target: Target, as_json: opt.Json = False) -> None:
    """Convert an adapter that was saved as a pickle to safetensors."""
    with needs_extra("server"):
        from manyhats.adapters.lowering.convert import WARNING
        from manyhats.adapters.lowering.convert import convert as convert_directory
    if source.is_dir() and any(path.suffix in _PICKLES for path in source.iterdir()):
        typer.echo(f"warning: {WARNING}", err=True)
    with _adapter_errors():
        made = convert_directory(source, target)
    for note in made.notes:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        print_json(
            {
                "source": str(made.source),
                "target": str(made.target),
                "num_tensors": made.num_tensors,
                "num_repeated": made.num_repeated,
                "size_bytes": made.size_bytes,
                "notes": made.notes,
            }
        )
        return
    repeated = f", {made.num_repeated} repeated names left out" if made.num_repeated else ""
    typer.echo(
        f"converted: {made.target} ({made.num_tensors} tensors{repeated}, {human_bytes(made.size_bytes)})"
    )


def layer_ranges(layers: Sequence[int]) -> str:
    """Ascending layers, abbreviated: ``0-2, 5``."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _print_facts(found: Inspection) -> None:
    print_fields(
        {
            "path": found.path,
            "format": found.format,
            "method": found.method,
            "kind": f"{found.kind}, {found.num_outputs} outputs" if found.num_outputs else found.kind,
            "base model": found.base_model,
            "compared with": found.compared_with,
            "size": human_bytes(found.size_bytes) if found.size_bytes else "",
            "parameters": human_count(found.num_parameters) if found.num_parameters else "",
            "tensors": str(len(found.tensors) or ""),
            "virtual tokens": str(found.num_virtual_tokens or ""),
            "text files": ", ".join(found.text_files),
            "digest": found.digest,
        }
    )


def _site_row(site: SiteFacts) -> tuple[str, ...]:
    shapes = (
        f"{name} {' or '.join(str(list(shape)) for shape in found)}" for name, found in site.shapes.items()
    )
    ranks = ", ".join(str(rank) for rank in site.ranks)
    return (site.site, site.operation, layer_ranges(site.layers), ranks, ", ".join(shapes))


def _describe(model: str) -> BaseDescription:
    """A base described by its config, and by its tokenizer if an adapter brings one; its weights are not read."""
    with needs_extra("server"):
        from manyhats.engine.checkpoints.checkpoint import read_json
        from manyhats.engine.checkpoints.fetch import locate_model
        from manyhats.engine.errors import ModelError
        from manyhats.engine.home import default_home
        from manyhats.engine.model.describe import describe
        from manyhats.engine.model.families.reading import read_family
    try:
        located = locate_model(model, default_home())
        family = read_family(read_json(located.directory / "config.json"))
        return describe(
            family,
            names=located.names,
            digest="",
            check_text=partial(_check_text, located.directory),
        )
    except (ModelError, OSError) as error:
        raise CommandError(str(error)) from error


def _check_text(directory: Path, files: Mapping[str, bytes | bytearray]) -> TextFacts:
    """What text files mean relative to the tokenizer in a base's directory."""
    from manyhats.engine.text.task_text import TaskTexts
    from manyhats.engine.text.text_process import TextProcesses
    from manyhats.engine.text.tokenizer import Tokenizer

    processes = TextProcesses()
    try:
        return TaskTexts(Tokenizer.from_directory(directory), processes).check(files)
    finally:
        processes.close()


@contextmanager
def _adapter_errors() -> Iterator[None]:
    from manyhats.adapters.errors import AdapterError

    try:
        yield
    except AdapterError as error:
        raise CommandError(str(error)) from error
