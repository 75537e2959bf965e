"""What commands print: JSON for programs, tables for people."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any

import typer


def to_plain(value: Any) -> Any:
    """The value in JSON's types; a dataclass becomes an object of its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print one JSON value; ``indent=None`` puts it on one line, for streams."""
    typer.echo(json.dumps(to_plain(value), indent=indent, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn if stdout is a terminal, otherwise tab-separated lines under a header."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            typer.echo("\t".join(_one_line(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def print_fields(fields: Mapping[str, str]) -> None:
    """Print one thing's fields, a line each, aligned if stdout is a terminal; empty ones are left out."""
    shown = {name: value for name, value in fields.items() if value}
    width = max((len(name) for name in shown), default=0) if sys.stdout.isatty() else 0
    for name, value in shown.items():
        typer.echo(f"{name + ':':<{width + 1}} {_one_line(value)}")


def human_bytes(size: float) -> str:
    """``1.2 MB``: decimal units, two or three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def human_count(count: float) -> str:
    """``135 M``: like ``human_bytes``, for plain numbers."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.0f}{unit}" if not unit or count >= 100 else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} G"


def _one_line(text: str) -> str:
    """Newlines, tabs and other control characters escaped, so that a row stays one row."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
