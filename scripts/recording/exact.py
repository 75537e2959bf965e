"""Values as a recording has them: exact, plain JSON, without what differs from run to run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import TypeAlias

Recorded: TypeAlias = "str | int | bool | list[Recorded] | dict[str, Recorded] | None"

# Times and what hangs on them, and what is drawn at random.
_VARYING = frozenset(
    {
        "catalogue_id",
        "create_time",
        "date",
        "duration_s",
        "out",
        "peak_memory",
        "residency",
        "seconds",
        "speed",
        "tokens_per_second",
    }
)


def exact(value: object) -> Recorded:
    """A value as plain JSON: floats in hex, to the bit; fields that differ from run to run left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Enum):
        return exact(value.value)
    if isinstance(value, Mapping):
        return {str(key): exact(item) for key, item in value.items() if key not in _VARYING}
    if isinstance(value, Iterable) and not isinstance(value, datetime | bytes):
        return [exact(item) for item in value]
    raise TypeError(f"{value!r} has no exact form")


def row_of_floats(values: Iterable[float | None]) -> str:
    """Numbers in one line, each in hex, to the bit."""
    return " ".join("-" if value is None else value.hex() for value in values)


def digest(value: object) -> str:
    """SHA-256 of a value's exact form."""
    return hashlib.sha256(json.dumps(exact(value), sort_keys=True).encode()).hexdigest()


def file_digests(directory: Path) -> dict[str, Recorded]:
    """Relative path → SHA-256 of every file under a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
