"""Rows of what the ``datasets`` package can load: a name on the Hugging Face hub, or a directory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhats.trainer.data.packages import import_for
from manyhats.trainer.data.row import Row, check_columns
from manyhats.trainer.errors import DataError

DEFAULT_SPLIT = "train"
_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_NAME = re.compile(rf"(?P<name>{_PART}(?:/{_PART})?)(?:/(?P<config>{_PART}))?")


@dataclass(frozen=True, slots=True)
class DatasetName:
    """``NAME[/CONFIG][:SPLIT]``.

    Attributes:
        name: ``org/name`` or ``name`` on the hub, or an existing directory.
        config: None takes the only one, or the default.
        split: also a slice such as ``train[:10%]``.
    """

    name: str
    config: str | None
    split: str


def parse_dataset_name(source: str) -> DatasetName:
    """Parse a name. A directory is a name; one that declares configurations may be followed by one of them.

    Raises:
        DataError: it is neither a directory nor a possible name on the hub.
    """
    path, _, split = source.partition(":")
    head, _, tail = path.rpartition("/")
    split = split or DEFAULT_SPLIT
    if path and Path(path).is_dir():
        return DatasetName(path, None, split)
    if head and _declares_configs(Path(head)):
        return DatasetName(head, tail, split)
    match = _HUB_NAME.fullmatch(path)
    if match is None:
        raise DataError(source, None, "is neither a file, a directory nor the name of a data set")
    return DatasetName(match["name"], match["config"], split)


def _declares_configs(directory: Path) -> bool:
    """Whether it is a data set whose card names configurations; if not, what follows it is a mistyped path."""
    card = directory / "README.md"
    return card.is_file() and b"config_name:" in card.read_bytes()


def read_dataset(source: str) -> Iterator[Row]:
    """One row per record of a split; its line is the record's number from 1.

    Raises:
        DataError: ``datasets`` is not installed or cannot load this, or no column is known.
    """
    name = parse_dataset_name(source)
    datasets = import_for(source, "datasets")
    try:
        table = _load(datasets, name)
    except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = "is a directory, and " if Path(name.name).is_dir() else ""
        raise DataError(source, None, f"{what}the datasets package cannot load it: {error}") from error
    check_columns(source, table.column_names)
    for line, fields in enumerate(table, start=1):
        yield Row(fields, source, line)


def _load(datasets: Any, name: DatasetName) -> Any:
    """The split as a table; a directory that ``save_to_disk`` wrote is opened as such."""
    directory = Path(name.name)
    if (directory / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(directory))[name.split]
    if (directory / "state.json").is_file():
        return datasets.load_from_disk(str(directory))
    return datasets.load_dataset(name.name, name.config, split=name.split)
