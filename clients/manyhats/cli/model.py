"""``manyhats model``: base models on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.terminal.extras import needs_extra, quiet_libraries
from manyhats.cli.terminal.failures import CommandError, command_group
from manyhats.cli.terminal.interrupts import prompt_interrupts
from manyhats.cli.terminal.output import human_bytes, human_count, print_fields, print_json
from manyhats.cli.terminal.progress import shown_progress

DEFAULT_MODEL = "smollm2-135m-instruct"

HELP = """Fetch and inspect base models.

They are kept in [bold]$MANYHATS_HOME[/bold], or ~/.cache/manyhats.
"""
FETCH_HELP = """Fetch a base model and print its directory.

A model that is already there is only checked.

[bold]Examples[/bold]

  $ manyhats model fetch

  $ manyhats model fetch Qwen/Qwen2.5-0.5B-Instruct
"""
INFO_HELP = """Show a base model's size, context and directory.

[bold]Examples[/bold]

  $ manyhats model info

  $ manyhats model info ./my-model --json
"""

app = command_group(HELP)

Source = Annotated[
    str, typer.Argument(metavar="MODEL", help="A known model's name, a Hugging Face directory, or a hub id.")
]
Home = Annotated[
    Path | None, typer.Option("--home", metavar="DIR", help="Keep models here.", envvar="MANYHATS_HOME")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What ``model info`` shows; ``nf4_bytes`` is what the weights take when served in NF4."""

    name: str
    path: str
    model_type: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context_length: int
    quantization: str
    size_bytes: int
    nf4_bytes: int


@app.command(help=FETCH_HELP)
def fetch(model: Source = DEFAULT_MODEL, home: Home = None, as_json: opt.Json = False) -> None:
    """Fetch a base model and print its directory."""
    with needs_extra("server"):
        from manyhats.engine.checkpoints.fetch import KNOWN_MODELS, fetch_model, locate_model
        from manyhats.engine.home import default_home
    quiet_libraries()
    with prompt_interrupts(), _model_errors(), shown_progress() as report:
        where = home or default_home()
        if model in KNOWN_MODELS:
            path = fetch_model(model, where, report)
        else:
            path = locate_model(model, where, report).directory
    if as_json:
        print_json({"name": model, "path": str(path)})
    else:
        typer.echo(path)


@app.command(help=INFO_HELP)
def info(model: Source = DEFAULT_MODEL, home: Home = None, as_json: opt.Json = False) -> None:
    """Show a base model's size, context and directory."""
    with _model_errors():
        found = _describe(model, home)
    if as_json:
        print_json(found)
        return
    print_fields(
        {
            "model": found.name,
            "path": found.path,
            "type": found.model_type,
            "parameters": human_count(found.num_parameters),
            "layers": f"{found.num_layers} of width {found.hidden_size}",
            "context": f"{found.max_context_length} tokens",
            "vocabulary": f"{found.vocab_size} tokens",
            "quantization": found.quantization,
            "size on disk": human_bytes(found.size_bytes),
            "served as nf4": human_bytes(found.nf4_bytes),
        }
    )


def _describe(model: str, home: Path | None) -> ModelInfo:
    with needs_extra("server"):
        from manyhats.engine.checkpoints import checkpoint, size
        from manyhats.engine.model.families.reading import read_family
    directory = _directory(model, home)
    raw_config = checkpoint.read_json(directory / "config.json")
    family = read_family(raw_config)
    architecture = family.architecture
    return ModelInfo(
        name=model,
        path=str(directory),
        model_type=architecture.model_type,
        num_parameters=size.num_parameters(family),
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        max_context_length=architecture.max_context_length,
        quantization="nf4" if checkpoint.check_quantization_config(raw_config) else "none",
        size_bytes=sum(path.stat().st_size for path in checkpoint.weight_files(directory)),
        nf4_bytes=size.weight_bytes(family, is_nf4=True),
    )


def _directory(model: str, home: Path | None) -> Path:
    """Where a model is; a known one is not fetched just to be shown."""
    with needs_extra("server"):
        from manyhats.engine.checkpoints.fetch import KNOWN_MODELS, locate_model
        from manyhats.engine.home import default_home
    where = home or default_home()
    if model in KNOWN_MODELS and not (where / "models" / model).is_dir():
        raise CommandError(f"{model} is not on this machine; `manyhats model fetch {model}` gets it")
    return locate_model(model, where).directory


@contextmanager
def _model_errors() -> Iterator[None]:
    with needs_extra("server"):
        from manyhats.engine.errors import ModelError
    try:
        yield
    except (ModelError, OSError) as error:
        raise CommandError(str(error)) from error
